"""`python -m jblock.compile_check`: does every program compile for every accelerator, and fit it?

Compiles the programs of real models' blocks under the sharding rules for TPUs and GPUs that are not
there, with their real compilers, and holds each whole model's memory against the chips'. Each distinct
program is compiled once. `--write PAGE` puts the table into a page between its marks.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from jblock.engine.config import Bucket
from jblock.engine.executables import Executables, Geometry, PoolShape, ProgramKey
from jblock.engine.params import abstract_params
from jblock.engine.real_models import MODELS, Model
from jblock.pallas_kernels.paged_attention.api import backend_of
from jblock.parallel.placement import Placement
from jblock.parallel.rules import MeshShape, ShardingRules
from jblock.parallel.spread import kv_heads
from jblock.parallel.targets import CHIPS, GIB, Target

# Sixteen sequences of 2048 tokens: what a whole model is held against a chip's memory with.
SEQUENCES, TOKENS, PAGE_SIZE = 16, 2048, 64
BUCKETS = (Bucket(16, 1), Bucket(1, 256))
DTYPE = "bfloat16"
# What the runtime itself takes of a chip's memory, and room for fragments.
USABLE = 0.92

TARGETS = (
    *("tpu:v5e:1x1", "tpu:v5e:2x2", "tpu:v5e:2x4"),
    *("tpu:v6e:1x1", "tpu:v6e:2x2", "tpu:v6e:2x4"),
    *("tpu:v5p:1x1x1", "tpu:v5p:2x2x1", "tpu:v5p:2x2x2"),
    *("cuda:h200", "cuda:h200:2", "cuda:h200:4", "cuda:h200:8"),
)
# The smallest number of chips of a kind that holds a model; fewer are refused, and 9 is never reached.
SMALLEST = {
    "demo-1m": {"v5e": 1, "v6e": 1, "v5p": 1, "h200": 1},
    "demo-3m": {"v5e": 1, "v6e": 1, "v5p": 1, "h200": 1},
    "qwen3-0.6b": {"v5e": 1, "v6e": 1, "v5p": 1, "h200": 1},
    "llama3-8b": {"v5e": 4, "v6e": 1, "v5p": 1, "h200": 1},
    "qwen3-32b": {"v5e": 8, "v6e": 4, "v5p": 1, "h200": 1},
    "llama3-70b": {"v5e": 9, "v6e": 8, "v5p": 4, "h200": 2},
}
QUICK = (
    *(("demo-3m", t) for t in ("tpu:v5e:2x4", "cuda:h200:8")),
    *(("llama3-8b", t) for t in ("tpu:v6e:1x1", "tpu:v5p:2x2x1", "cuda:h200", "cuda:h200:4")),
    *(("llama3-8b", "tpu:v5e:1x1"), ("llama3-70b", "cuda:h200:2")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one target.

    Attributes:
      model: its name.
      target: its name.
      programs: how many it needs.
      code_bytes: of their machine code.
      weight_bytes: a chip's share of the weights.
      kv_bytes: a chip's share of the KV pools.
      temp_bytes: what the hungriest program needs beside its arguments on each chip.
      fits: whether all of that is in the chip's memory.
      expected: whether it should be.
      compile_seconds: of the programs that no earlier model had.
    """

    model: str
    target: str
    programs: int
    code_bytes: int
    weight_bytes: int
    kv_bytes: int
    temp_bytes: int
    fits: bool
    expected: bool
    compile_seconds: float


def keys(model: Model, placement: Placement) -> Iterator[ProgramKey]:
    """The programs that serve a model: plain greedy requests on two grids."""
    embedding, layer, head = model.signatures(DTYPE, placement.rules)
    pool = pool_shape(model, placement)
    for bucket in BUCKETS:
        for signature in (embedding, head):
            yield ProgramKey(kind=signature.kind, bucket=bucket, signatures=(signature,))
        yield ProgramKey(kind="layer", bucket=bucket, signatures=(layer,), pool=pool)
        size = Bucket(bucket.num_seqs, 1)
        yield ProgramKey(kind="greedy", bucket=size, vocab_size=model.vocab)
    decode = BUCKETS[0]
    yield ProgramKey(kind="layer", bucket=decode, signatures=(layer,) * 2, pool=pool)
    yield ProgramKey(kind="sampled", bucket=Bucket(decode.num_seqs, 1), vocab_size=model.vocab)
    yield ProgramKey(kind="scrub", pool=pool)


def pool_shape(model: Model, placement: Placement) -> PoolShape:
    """Pages for SEQUENCES x TOKENS tokens."""
    attention = model.attention
    return PoolShape(
        num_pages=SEQUENCES * TOKENS // PAGE_SIZE + 1,
        page_size=PAGE_SIZE,
        num_kv_heads=len(kv_heads(attention.num_kv_heads, placement.rules.ways("heads"))),
        head_dim=attention.head_dim,
        layers=model.layers,
        backend=backend_of(placement.platform.name),
    )


class Checker:
    """Compiles for one target, each program once.

    Attributes:
      target: what for.
      compiled: memory analyses by program.
    """

    def __init__(self, target: Target):
        self.target = target
        rules = ShardingRules(mesh=MeshShape(tp=target.chips))
        self.placement = Placement.on(rules, target.devices())
        geometry = Geometry(
            num_rows=256 + SEQUENCES, max_num_seqs=16, max_pages=TOKENS // PAGE_SIZE
        )
        self.executables = Executables(geometry, placement=self.placement)
        self.compiled: dict[ProgramKey, Any] = {}

    def check(self, model: Model) -> Result:
        """Compiles a model's programs and adds up its memory.

        Raises:
          Exception: the compiler's, when a program does not compile.
        """
        rules, began = self.placement.rules, time.monotonic()
        needed = list(dict.fromkeys(keys(model, self.placement)))
        for key in needed:
            if key not in self.compiled:
                self.compiled[key] = self.executables.lower(key).compile().memory_analysis()
        analyses = [self.compiled[key] for key in needed]
        embedding, layer, head = model.signatures(DTYPE, rules)
        weights = self._share(embedding) + self._share(layer) * model.layers + self._share(head)
        pool = pool_shape(model, self.placement)
        kv = pool.page_bytes * pool.num_pages // rules.ways("heads")
        temp = max(a.temp_size_in_bytes + _fresh_outputs(a) for a in analyses)
        chip = CHIPS[self.target.chip]
        return Result(
            model=model.name,
            target=str(self.target),
            programs=len(needed),
            code_bytes=sum(a.generated_code_size_in_bytes for a in analyses),
            weight_bytes=weights,
            kv_bytes=kv,
            temp_bytes=temp,
            fits=weights + kv + temp <= chip.memory * USABLE,
            expected=self.target.chips >= SMALLEST[model.name][self.target.chip],
            compile_seconds=round(time.monotonic() - began, 1),
        )

    def _share(self, signature) -> int:
        """Bytes of a unit's weights on each chip."""
        arrays = jax.tree.leaves(abstract_params(signature, self.placement))
        return sum(
            a.dtype.itemsize * _size(a.sharding.shard_shape(a.shape) if a.sharding else a.shape)
            for a in arrays
        )


def _size(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _fresh_outputs(analysis) -> int:
    return max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)


def run(cases: Sequence[tuple[str, str]]) -> list[Result]:
    """Checks (model, target) pairs, one target after the other."""
    results = []
    for name in dict.fromkeys(target for _, target in cases):
        checker = Checker(Target.parse(name))
        for model in [m for m, t in cases if t == name]:
            results.append(checker.check(MODELS[model]))
            print(_line(results[-1]), file=sys.stderr, flush=True)
    return results


def _line(result: Result) -> str:
    gib = [f"{b / GIB:.2f}" for b in (result.weight_bytes, result.kv_bytes, result.temp_bytes)]
    verdict = "fits" if result.fits else "refused"
    if result.fits != result.expected:
        verdict += " (NOT AS EXPECTED)"
    return " | ".join(
        (
            *(result.model, result.target, str(result.programs)),
            *(f"{result.code_bytes / 2**20:.1f}", *gib, verdict),
        )
    )


def table(results: Sequence[Result]) -> str:
    """Markdown of the results."""
    head = "| model | target | programs | code MiB | weights GiB | KV GiB | temporary GiB | |"
    rows = [f"| {_line(r)} |" for r in results]
    return "\n".join([head, "|---|---|---:|---:|---:|---:|---:|---|", *rows])


_QUICK = flags.DEFINE_bool("quick", False, "A spread of the matrix, as in make test.")
_ONLY = flags.DEFINE_list("only", None, "Targets to check; default: all.")
_JSON = flags.DEFINE_string("json", None, "Where to write the results as JSON.")
_WRITE = flags.DEFINE_string("write", None, "Page whose table is replaced by the results.")
_MARKS = "<!-- compile_check -->\n", "<!-- end -->\n"


def main(argv: Sequence[str]) -> int:
    """Returns 1 if a model that should fit does not, or one that should not does."""
    del argv
    every = [(m, t) for t in TARGETS for m in MODELS]
    cases = [
        c for c in (QUICK if _QUICK.value else every) if not _ONLY.value or c[1] in _ONLY.value
    ]
    try:
        results = run(cases)
    except ValueError as e:
        print(f"compile_check: {e}", file=sys.stderr)
        return 2
    if _JSON.value:
        data = {"jax": jax.__version__, "results": [dataclasses.asdict(r) for r in results]}
        Path(_JSON.value).write_text(json.dumps(data, indent=1) + "\n")
    if _WRITE.value:
        page = Path(_WRITE.value)
        before, _, rest = page.read_text().partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        page.write_text(f"{before}{_MARKS[0]}{table(results)}\n{_MARKS[1]}{after}")
    return int(any(r.fits != r.expected for r in results))


if __name__ == "__main__":
    app.run(main)
