"""How near decode and prefill come to what memory and matmuls allow on this machine.

Every figure is the median of ratios whose two sides were measured right after each other.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape
from bench.rates import BestMatmul, ReadBandwidth, SmallRowsMatmul
from bench.report import median, progress, spread
from bench.stepper import Stepper
from jblock.engine.config import DTYPES, EngineConfig

_PAGE = 64
_CASES = ("decode_b1", "decode_b32", "prefill_512", "decode_32x1024")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured.

    Attributes:
      shape: of the model.
      batch: sequences of the large decode batch.
      prompt: tokens of the prefill case.
      cached: tokens each sequence has cached in the long case.
      rounds: repetitions.
      bandwidth_mib: array that is read to measure bandwidth.
      matmul_scale: divides the sides of the large matmuls.
    """

    shape: ModelShape = MODEL_250M
    batch: int = 32
    prompt: int = 512
    cached: int = 1024
    rounds: int = 21
    bandwidth_mib: int = 1536
    matmul_scale: int = 1


_QUICK = Sizes(shape=TINY, prompt=64, cached=128, rounds=2, bandwidth_mib=64, matmul_scale=8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), default="float32", help="both: bfloat16 beside"
    )
    parser.add_argument("--only", choices=_CASES, help="one of the figures only")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fractions of the bounds, for float32 and, if asked, for bfloat16 beside."""
    sizes = _QUICK if args.quick else Sizes()
    dtypes = DTYPES if args.dtype == "both" else (args.dtype,)
    cases = (args.only,) if args.only else _CASES
    result: dict[str, Any] = {"compiles_on_serving_path": 0}
    for dtype in dtypes:
        bench = _Roofline(sizes, dtype, args.cache)
        figures = {case: getattr(bench, case)() for case in cases}
        key = "roofline" if dtype == dtypes[0] else f"roofline_{dtype}"
        result[key] = {case: figure["ratio"] for case, figure in figures.items()}
        result[f"{key}_detail"] = {"dtype": dtype, **figures}
        bench.finish()
        result["compiles_on_serving_path"] += bench.compiles
    return result


class _Roofline:
    """One model in one dtype, and the machine's rates."""

    def __init__(self, sizes: Sizes, dtype: str, cache: Path):
        self.sizes, self.dtype, self.cache, self.compiles = sizes, dtype, cache, 0
        self.zoo = MemoryZoo(sizes.shape)
        self.zoo.add_base("base")
        self.bandwidth = ReadBandwidth(sizes.bandwidth_mib)
        self.best_matmul = BestMatmul(dtype, sizes.matmul_scale)
        self._short: Stepper | None = None

    def decode_b1(self) -> dict[str, Any]:
        """Bytes that must move / time, over the measured read bandwidth, one sequence."""
        return self._against_bandwidth("decode_b1", self.short, 1, 16)

    def decode_32x1024(self) -> dict[str, Any]:
        """The same with all sequences deep in their context; KV read counts too."""
        sizes = self.sizes
        self.finish()  # Its KV pools make room for the long ones.
        grid = (4, min(256, sizes.cached // 2))
        # The first sequences go on decoding while the last are prefilled: they get room for that.
        stepper = self._stepper(sizes.cached + 2 * _PAGE, (grid,), (sizes.batch,))
        progress(f"prefill of {sizes.batch} x {sizes.cached} tokens")
        result = self._against_bandwidth(
            "decode_32x1024", lambda: stepper, sizes.batch, sizes.cached - _PAGE // 2
        )
        self._count(stepper)
        return result

    def decode_b32(self) -> dict[str, Any]:
        """FLOP/s of a decode step over the matmul rate at as many rows."""
        shape, batch, prompt = self.sizes.shape, self.sizes.batch, 16
        stepper = self.short()
        units = [u for i in stepper.graph.routes["base"].instances for u in i.layers]
        matmuls = SmallRowsMatmul(units, batch)
        steps = 2
        matmuls.measure()

        def flops(position: float) -> float:
            return batch * _flops_per_token(shape, position) + 2 * batch * shape.head_weights

        rates, times, cached = self._decode(stepper, batch, prompt, steps, matmuls.measure)
        work = flops(cached / batch)
        return self._ratio("decode_b32", "gflops", [work / t for t in times], rates)

    def prefill_512(self) -> dict[str, Any]:
        """FLOP/s from handing over a prompt to its first token, over the best matmul rate."""
        shape, prompt = self.sizes.shape, self.sizes.prompt
        stepper = self.short()
        flops = prompt * _flops_per_token(shape, prompt / 2) + 2 * shape.head_weights
        stepper.first_token("base", stepper.prompt("base", prompt))
        self.best_matmul.measure()
        rates, achieved = [], []
        for _ in range(-(-self.sizes.rounds // 2)):
            rates.append(self.best_matmul.measure())
            ids = stepper.prompt("base", prompt)
            achieved.append(flops / stepper.first_token("base", ids))
        result = self._ratio("prefill_512", "gflops", achieved, rates)
        result["tokens_per_second"] = round(prompt * median(achieved, 0) / flops, 1)
        return result

    def short(self) -> Stepper:
        """The agent of all cases but the long one, made once."""
        if self._short is None:
            sizes = sorted({1, self.sizes.batch})
            prompt = self.sizes.prompt
            grids = ((8, 16), (1, prompt))
            self._short = self._stepper(prompt + _PAGE, grids, tuple(sizes))
        return self._short

    def finish(self) -> None:
        """Lets the short agent go."""
        if self._short is not None:
            self._count(self._short)
            self._short = None

    def _count(self, stepper: Stepper) -> None:
        self.compiles += stepper.stats().compiles_on_serving_path

    def _stepper(self, length: int, grids, sizes: tuple[int, ...]) -> Stepper:
        progress(f"loading and compiling in {self.dtype}, up to {length} tokens a sequence")
        seqs, shape = max(sizes), self.sizes.shape
        config = EngineConfig(
            dtype=self.dtype,
            max_num_seqs=seqs,
            max_model_len=length,
            page_size=_PAGE,
            kv_memory_mb=1 + 4 * seqs * shape.kv_floats_per_token * length // 10**6,
            decode_sizes=sizes,
            prefill_grids=grids,
        )
        return Stepper(self.zoo, self.zoo.served, config, self.cache)

    def _against_bandwidth(
        self, case: str, make: Callable[[], Stepper], batch: int, prompt: int
    ) -> dict[str, Any]:
        stepper, shape, steps = make(), self.sizes.shape, 2
        units = [u for i in stepper.graph.routes["base"].instances for u in i.layers]
        weights = sum(
            a.nbytes
            for u in units
            if u.signature.kind != "embedding" or shape.tied
            for tensors in u.params
            for a in tensors.values()
        )
        self.bandwidth.measure()
        rates, times, tokens = self._decode(stepper, batch, prompt, steps, self.bandwidth.measure)
        cached = tokens * shape.kv_floats_per_token * 4
        result = self._ratio(case, "gbytes", [(weights + cached) / t for t in times], rates)
        result |= {"weight_bytes": weights, "kv_bytes": int(cached), "cached_tokens": int(tokens)}
        return result

    def _decode(
        self, stepper: Stepper, batch: int, prompt: int, steps: int, rate: Callable[[], float]
    ) -> tuple[list[float], list[float], float]:
        """The machine's rate and seconds of a step, measured in turns, and the tokens cached in the
        middle of it, over all sequences."""
        rounds = self.sizes.rounds
        ids = stepper.fill(["base"] * batch, prompt, stepper.config.max_model_len - prompt)
        stepper.steps(2, batch)
        before = stepper.tokens(ids)
        rates, times = [], []
        for _ in range(rounds):
            rates.append(rate())
            times.append(stepper.steps(steps, batch) / steps)
        cached = (before + stepper.tokens(ids)) / 2
        stepper.drain(ids)
        return rates, times, cached

    def _ratio(
        self, case: str, unit: str, achieved: list[float], rates: list[float]
    ) -> dict[str, Any]:
        ratios = [a / r for a, r in zip(achieved, rates, strict=True)]
        got, bound = statistics.median(achieved) / 1e9, statistics.median(rates) / 1e9
        progress(f"{case} ({self.dtype}): {got:.1f} of {bound:.1f} {unit}/s, {median(ratios, 3)}")
        return {
            "ratio": median(ratios),
            "ratio_of_best": round(max(achieved) / max(rates), 4),
            "spread": spread(ratios),
            f"{unit}_per_second": spread([a / 1e9 for a in achieved], 2),
            f"bound_{unit}_per_second": spread([r / 1e9 for r in rates], 2),
        }


def _flops_per_token(shape: ModelShape, position: float) -> float:
    """Operations of one token through all layers, the head apart, seeing `position` tokens."""
    attention = 4 * position * shape.num_heads * shape.head_dim
    return shape.layers * (2 * shape.layer_weights + attention)
