"""What the compile matrix holds: which programs are compiled for which targets, and what should fit.

Two parts. Whole models: the programs of every form of block under the sharding rules, `tp` over all chips of
a target, and the model's memory against a chip's. Kernels: what each op's `shapes.programs` lists, for one
chip of a kind. Each distinct program of a target is compiled once, two at a time; all of them are queued
before a result is waited for, so that no worker idles while the other ends a model.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jblock.engine.config import Bucket
from jblock.engine.kv_cache.spec import PoolShape
from jblock.engine.programs.executables import Executables
from jblock.engine.programs.keys import Geometry, ProgramKey
from jblock.engine.weights.params import abstract_params
from jblock.pallas_kernels.paged_attention.api import backend_of
from jblock.parallel.placement import Placement
from jblock.parallel.rules import MeshShape, ShardingRules
from jblock.parallel.spread import kv_heads
from jblock.parallel.targets import CHIPS, Target
from jblock.tools.real_models import MODELS, Model

# Sixteen sequences of 2048 tokens: what a whole model is held against a chip's memory with.
SEQUENCES, TOKENS, PAGE_SIZE = 16, 2048, 64
BUCKETS = (Bucket(16, 1), Bucket(1, 64))
# What the runtime itself takes of a chip's memory, and room for fragments.
USABLE = 0.92
WORKERS = 2

TARGETS = (
    *("tpu:v5e:1x1", "tpu:v5e:2x2", "tpu:v5e:2x4"),
    *("tpu:v6e:1x1", "tpu:v6e:2x2", "tpu:v6e:2x4"),
    *("tpu:v5p:1x1x1", "tpu:v5p:2x2x1", "tpu:v5p:2x2x2"),
    *("cuda:h200", "cuda:h200:2", "cuda:h200:4", "cuda:h200:8"),
)
# (model, dtype) -> the smallest number of chips of a kind that holds it; fewer are refused, and 9 is never
# reached.
SMALLEST = {
    ("demo-1m", "float32"): {"v5e": 1, "v6e": 1, "v5p": 1, "h200": 1},
    ("demo-3m", "bfloat16"): {"v5e": 1, "v6e": 1, "v5p": 1, "h200": 1},
    ("qwen3-0.6b", "bfloat16"): {"v5e": 1, "v6e": 1, "v5p": 1, "h200": 1},
    ("llama3-8b", "bfloat16"): {"v5e": 4, "v6e": 1, "v5p": 1, "h200": 1},
    ("llama3-8b", "float32"): {"v5e": 4, "v6e": 4, "v5p": 1, "h200": 1},
    ("gemma3-27b", "bfloat16"): {"v5e": 8, "v6e": 4, "v5p": 1, "h200": 1},
    ("qwen3-32b", "bfloat16"): {"v5e": 8, "v6e": 4, "v5p": 1, "h200": 1},
    ("mixtral-8x7b", "bfloat16"): {"v5e": 8, "v6e": 4, "v5p": 4, "h200": 1},
    ("llama3-70b", "bfloat16"): {"v5e": 9, "v6e": 8, "v5p": 4, "h200": 2},
}
# TPUs multiply float32 in six passes, and such a program takes three times as long to compile: a large model
# in it is checked on these targets only. demo-1m is float32 on all.
LARGE_FLOAT32 = ("llama3-8b", "float32"), ("tpu:v5e:2x2", "cuda:h200")
CASES = tuple(
    (*model, target)
    for target in TARGETS
    for model in SMALLEST
    if model != LARGE_FLOAT32[0] or target in LARGE_FLOAT32[1]
)
QUICK = (
    ("llama3-8b", "bfloat16", "tpu:v6e:1x1"),
    ("mixtral-8x7b", "bfloat16", "cuda:h200:2"),
)

# One chip of each kind compiles kernels, on the shapes of these models: on v5e all that the matrix has.
_DENSE = ("llama-3-70b", "qwen3-0.6b", "qwen3-32b", "gemma-3-27b-global")
_SPREAD = ("llama-3-8b", "gemma-3-27b-local", "gemma-3-27b", "mixtral-8x7b", "demo")
KERNEL_TARGETS = {
    "tpu:v5e:1x1": (*_SPREAD, *_DENSE),
    "tpu:v6e:1x1": ("llama-3-8b", "mixtral-8x7b"),
    "tpu:v5p:1x1x1": ("llama-3-8b", "mixtral-8x7b"),
    "cuda:h200": _SPREAD,
}
QUICK_KERNELS = ("tpu:v6e:1x1", "cuda:h200")  # one program of each op
# By op: the arguments that a program updates in place.
_DONATED = {"paged_attention": (3,), "grouped_delta_matmul": (0,)}
_KERNELS = Path(__file__).parent / "pallas_kernels"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One model, or the kernels of one op, on one target.

    Attributes:
      model: its name, or that of the op.
      dtype: of a model's weights.
      target: its name.
      programs: how many there are.
      code_bytes: of their machine code, as far as the compiler says.
      weight_bytes: a chip's share of the weights.
      kv_bytes: a chip's share of the KV pools.
      temp_bytes: what the hungriest program needs beside its arguments on each chip.
      fits: whether all of that is in the chip's memory.
      expected: whether it should be.
      failures: programs that did not compile, each with what the compiler said.
      compile_seconds: of the programs that no earlier case had, added up.
    """

    model: str
    dtype: str
    target: str
    programs: int
    code_bytes: int
    weight_bytes: int = 0
    kv_bytes: int = 0
    temp_bytes: int = 0
    fits: bool = True
    expected: bool = True
    failures: tuple[str, ...] = ()
    compile_seconds: float = 0.0

    @property
    def as_expected(self) -> bool:
        """Whether all compiled, and what should fit does."""
        return not self.failures and self.fits == self.expected


def keys(model: Model, dtype: str, placement: Placement, memory: int) -> Iterator[ProgramKey]:
    """The programs that serve a model: plain greedy requests on two grids.

    A compiler refuses arguments over a chip's `memory` (bytes), and what is to be seen of a model that is too
    large is whether its programs compile at all: pages take at most half of it.
    """
    ends = model.ends(dtype, placement.rules)
    layers = model.layer_signatures(dtype, placement.rules)
    pool = pool_shape(model, dtype, placement)
    most = memory // 2 * placement.rules.ways("heads") // pool.page_bytes
    pool = dataclasses.replace(pool, num_pages=min(pool.num_pages, most))
    vocab = model.unembedding.vocab_size
    for bucket in BUCKETS:
        for signature in ends:
            yield ProgramKey(kind=signature.kind, bucket=bucket, signatures=(signature,))
        for signature in layers:
            yield ProgramKey(kind="layer", bucket=bucket, signatures=(signature,), pool=pool)
        size = Bucket(bucket.num_seqs, 1)
        yield ProgramKey(kind="greedy", bucket=size, vocab_size=vocab)
    decode = BUCKETS[0]
    pair = model.pair(dtype, placement.rules)
    yield ProgramKey(kind="layer", bucket=decode, signatures=pair, pool=pool)
    yield ProgramKey(kind="sampled", bucket=Bucket(decode.num_seqs, 1), vocab_size=vocab)
    yield ProgramKey(kind="zero_pages", pool=pool)


def pool_shape(model: Model, dtype: str, placement: Placement) -> PoolShape:
    """Pages for SEQUENCES x TOKENS tokens in all layers, of the dtype of the weights."""
    attention = model.attention
    return PoolShape(
        num_pages=len(model.layers) * SEQUENCES * TOKENS // PAGE_SIZE + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=len(kv_heads(attention.num_kv_heads, placement.rules.ways("heads"))),
        head_dim=attention.head_dim,
        dtype=dtype,
        backend=backend_of(placement.platform.name),
    )


@dataclasses.dataclass(frozen=True)
class _Compiled:
    """What became of one program: XLA's memory analysis, or what the compiler said."""

    analysis: Any
    failure: str
    seconds: float


class Checker:
    """Compiles for one target, each program once. A context: what was not begun at its end is dropped.

    Attributes:
      target: what for.
    """

    def __init__(self, target: Target):
        self.target = target
        rules = ShardingRules(mesh=MeshShape(tp=target.chips))
        self.placement = Placement.on(rules, target.devices(), abstract=True)
        geometry = Geometry(num_rows=64 + SEQUENCES, max_num_seqs=16, max_pages=TOKENS // PAGE_SIZE)
        self._executables = Executables(geometry, placement=self.placement)
        self._pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
        self._queued: dict[Any, concurrent.futures.Future[_Compiled]] = {}

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def model(self, name: str, dtype: str) -> Callable[[], Result]:
        """Queues a model's programs; returns what waits for them and adds up its memory."""
        model, rules = MODELS[name], self.placement.rules
        chip = CHIPS[self.target.chip]
        needed = list(dict.fromkeys(keys(model, dtype, self.placement, chip.memory)))
        lower = self._executables.lower
        # Layers that differ in their window have one name.
        outcome = self._queue(
            {f"{k.name} #{i}": (k, functools.partial(lower, k)) for i, k in enumerate(needed)}
        )

        def result() -> Result:
            weights = sum(map(self._share, model.ends(dtype, rules)))
            for signature, count in model.layer_signatures(dtype, rules).items():
                weights += count * self._share(signature)
            pool = pool_shape(model, dtype, self.placement)
            kv = pool.page_bytes * pool.num_pages // rules.ways("heads")
            analyses, reported = outcome()
            temp = max((a.temp_size_in_bytes + _fresh_outputs(a) for a in analyses), default=0)
            return Result(
                model=name,
                dtype=dtype,
                weight_bytes=weights,
                kv_bytes=kv,
                temp_bytes=temp,
                fits=weights + kv + temp <= chip.memory * USABLE,
                expected=self.target.chips >= SMALLEST[name, dtype][self.target.chip],
                **reported,
            )

        return result

    def kernels(
        self, op: str, models: Sequence[str], most: int | None = None
    ) -> Callable[[], Result]:
        """Queues what an op lists for these models: each distinct program once, and the first `most` of
        them if given; returns what waits for them."""
        made: dict[str, tuple[str, Callable[[], Any]]] = {}
        for name, function, arguments in _programs(op, self.placement, models):
            lower = lowering(op, self.placement, function, arguments)
            # Models of one shape have one program.
            made.setdefault(repr((getattr(function, "keywords", None), arguments)), (name, lower))
        chosen = list(made.values())[:most]
        outcome = self._queue({name: ((op, name), lower) for name, lower in chosen})

        def result() -> Result:
            analyses, reported = outcome()
            temp = max((a.temp_size_in_bytes for a in analyses), default=0)
            return Result(model=op, dtype="", temp_bytes=temp, **reported)

        return result

    def _queue(
        self, work: Mapping[str, tuple[Any, Callable[[], Any]]]
    ) -> Callable[[], tuple[list[Any], dict[str, Any]]]:
        """Queues {name: (key, what lowers it)}; returns what waits for it, and gives the memory analyses and
        what every Result has."""

        def compile_one(name: str, lower: Callable[[], Any]) -> _Compiled:
            began, analysis, failure = time.monotonic(), None, ""
            try:
                analysis = lower().compile().memory_analysis()
            except Exception as e:  # a compiler's own, of any kind
                failure = f"{name}: {str(e).strip()[:500]}"
            return _Compiled(analysis, failure, time.monotonic() - began)

        new = {key: name for name, (key, _) in work.items() if key not in self._queued}
        for key, name in new.items():
            self._queued[key] = self._pool.submit(compile_one, name, work[name][1])

        def outcome() -> tuple[list[Any], dict[str, Any]]:
            done = {key: self._queued[key].result() for key, _ in work.values()}
            analyses = [d.analysis for d in done.values() if not d.failure]
            return analyses, {
                "target": str(self.target),
                "programs": len(work),
                "code_bytes": sum(a.generated_code_size_in_bytes for a in analyses),
                "failures": tuple(d.failure for d in done.values() if d.failure),
                "compile_seconds": round(sum(done[key].seconds for key in new), 1),
            }

        return outcome

    def _share(self, signature) -> int:
        """Bytes of a unit's weights on each chip."""
        arrays = jax.tree.leaves(abstract_params(signature, self.placement))
        return sum(
            a.dtype.itemsize * _size(a.sharding.shard_shape(a.shape) if a.sharding else a.shape)
            for a in arrays
        )


def ops(target: Target) -> list[str]:
    """The ops that have a kernel for a target."""
    backend = {"tpu": "tpu", "cuda": "mosaic_gpu"}[target.platform]
    return sorted(
        p.parent.name for p in _KERNELS.glob("*/shapes.py") if (p.parent / f"{backend}.py").exists()
    )


def _programs(
    op: str, placement: Placement, models: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    shapes = importlib.import_module(f"jblock.pallas_kernels.{op}.shapes")
    chosen = tuple(m for m in shapes.MODELS if m.name in models)
    if placement.platform.name == "tpu":
        return shapes.programs("tpu", chosen, device_kind=placement.platform.kind)
    return shapes.programs("mosaic_gpu", chosen)


def lowering(
    op: str, placement: Placement, function: Callable[..., Any], arguments: Any
) -> Callable[[], Any]:
    """What lowers a program of an op's `shapes.programs`; what it updates in place is donated."""

    def on_chip(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return placement.struct(a.shape, a.dtype)

    donated = _DONATED.get(op, ())
    return lambda: placement.lower(function, donated, jax.tree.map(on_chip, arguments), None)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _fresh_outputs(analysis) -> int:
    return max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
