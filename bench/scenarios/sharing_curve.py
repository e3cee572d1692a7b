"""The gain of sharing over rows a model, beside what bare matmuls would allow."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.models import ModelShape, fine_tunes
from bench.rates import LayerTimes
from bench.report import median, progress
from bench.stepper import Stepper
from jblock.engine.config import EngineConfig

ROWS = (1, 2, 4, 8, 16)
_PROMPT = 16
_PAGE = 64


def run(
    shape: ModelShape, models: int, private: int, cache: Path, *, quick: bool
) -> dict[str, Any]:
    """Decode steps of `models` fine-tunes with equally many rows each: tokens/s with blocks shared
    over one model each, and the bound.

    The bound takes the time of a layer's and the head's matmuls alone, at the rows each side brings
    to them: PM runs every layer once a model, sharing runs the common ones once for all.
    """
    rows = (1, 2) if quick else ROWS
    rounds, steps = (2, 1) if quick else (9, 2)
    zoo = fine_tunes(shape, models, private)
    sizes = sorted({*rows, *(models * r for r in rows)})
    sides: dict[str, Stepper] = {}
    for name in ("shared", "pm"):
        progress(f"curve: loading {models} models, {name}")
        sides[name] = Stepper(
            zoo, zoo.served, _config(shape, models, sizes, name == "shared"), cache
        )
    units = [u for i in sides["shared"].graph.routes["tune-0"].instances for u in i.layers]
    times = LayerTimes(units, sizes)
    curve: dict[str, Any] = {"rows": list(rows), "ratio": [], "bound": []}
    for r in rows:
        batch = models * r
        names = [name for name in sorted(zoo.served) for _ in range(r)]
        ids = {n: s.fill(names, _PROMPT, _PAGE - _PROMPT) for n, s in sides.items()}
        ratios, bounds = [], []
        for i in range(rounds):
            seconds = {}
            for name in ("pm", "shared") if i % 2 else ("shared", "pm"):
                seconds[name] = sides[name].steps(steps, batch)
            ratios.append(seconds["pm"] / seconds["shared"])
            bounds.append(_bound(times, shape.layers, private, models, r))
        for name, side in sides.items():
            side.drain(ids[name])
        curve["ratio"].append(median(ratios))
        curve["bound"].append(round(statistics.median(bounds), 4))
        progress(f"curve: {r} rows a model: {curve['ratio'][-1]}, bound {curve['bound'][-1]}")
    curve["compiles_on_serving_path"] = sum(
        s.stats().compiles_on_serving_path for s in sides.values()
    )
    return curve


def _bound(times: LayerTimes, layers: int, private: int, models: int, rows: int) -> float:
    apart, together = times.measure(rows), times.measure(models * rows)
    pm = models * (layers * apart.layer + apart.head)
    shared = (layers - private) * together.layer + private * models * apart.layer + together.head
    return pm / shared


def _config(shape: ModelShape, models: int, sizes: Sequence[int], share: bool) -> EngineConfig:
    seqs = max(sizes)
    return EngineConfig(
        max_num_seqs=seqs,
        max_model_len=_PAGE,
        page_size=_PAGE,
        kv_memory_mb=1 + seqs * _PAGE * 4 * shape.kv_floats_per_token // 10**6,
        decode_sizes=tuple(sizes),
        prefill_grids=((16, _PROMPT),),
        share=share,
    )
