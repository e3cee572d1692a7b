"""What the machine can do: bytes read a second, and FLOP/s of float32 and bfloat16 matmuls."""

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.linear import matmul
from jblock.blocks.platform import here
from jblock.blocks.spec import FfnSpec
from jblock.engine.graph.graph import Layer


class ReadBandwidth:
    """Reads a large array once, split over as many threads as there are CPUs.

    Two readers are tried, a jitted sum and a jitted product with a vector, and the faster counts:
    the figure stands for what memory gives, not for what one loop of XLA does.
    """

    def __init__(self, mebibytes: int = 1024):
        """Takes `mebibytes` of memory; more than three times the cache is wanted."""
        self._threads = max(1, len(os.sched_getaffinity(0)))
        columns = 4096
        rows = max(1, mebibytes * 2**20 // (4 * columns * self._threads))
        self._parts = [jnp.full((rows, columns), 1.0, jnp.float32) for _ in range(self._threads)]
        vector = jnp.full((columns,), 0.5, jnp.float32)
        shape = self._parts[0]
        self._readers = (
            jax.jit(jnp.sum).lower(shape).compile(),
            jax.jit(lambda a: a @ vector).lower(shape).compile(),
        )
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads)
        self.nbytes = sum(p.nbytes for p in self._parts)

    def measure(self) -> float:
        """Bytes a second, once through the array with each reader."""
        best = 0.0
        for reader in self._readers:
            begin = time.perf_counter()
            jax.block_until_ready(list(self._pool.map(reader, self._parts)))
            best = max(best, self.nbytes / (time.perf_counter() - begin))
        return best


class SmallRowsMatmul:
    """Bare matmuls of a few rows over the weights a model has resident: gate and down of every ffn,
    one after another, which is more than the caches hold on the 250M model."""

    def __init__(self, units: Sequence[Layer], rows: int):
        """Compiles the chain over the units' own arrays, in place."""
        self._weights: list[tuple[jax.Array, jax.Array]] = []
        for unit in units:
            for spec, tensors in zip(unit.signature.specs, unit.params, strict=True):
                if isinstance(spec, FfnSpec):
                    self._weights.append((tensors["gate.weight"], tensors["down.weight"]))
        if not self._weights:
            raise ValueError("the model has no ffn to take weights from")
        width = _inputs(self._weights[0][0])
        self._x = jnp.full((rows, width), 0.01, jnp.float32)
        self.flops = 2 * rows * sum(g.size + d.size for g, d in self._weights)
        self.nbytes = sum(g.nbytes + d.nbytes for g, d in self._weights)
        self._program = jax.jit(_chain).lower(self._x, self._weights).compile()

    def measure(self) -> float:
        """FLOP/s, once through all weights."""
        begin = time.perf_counter()
        self._program(self._x, self._weights).block_until_ready()
        return self.flops / (time.perf_counter() - begin)


class BestMatmul:
    """The best matmul rate of a few large shapes."""

    SHAPES = ((2048, 2048, 2048), (512, 1024, 2816), (1024, 1024, 4096))

    def __init__(self, dtype: str, scale: int = 1):
        """Compiles the shapes, each side divided by `scale`."""
        self._cases: list[tuple[Any, jax.Array, jax.Array, int]] = []
        for m, k, n in self.SHAPES:
            m, k, n = m // scale, k // scale, n // scale
            x = jnp.asarray(np.ones((m, k), np.float32))
            w = jnp.full((n, k) if here().out_in else (k, n), 0.01, dtype)
            self._cases.append((jax.jit(_matmul).lower(x, w).compile(), x, w, 2 * m * k * n))

    def measure(self) -> float:
        """FLOP/s of the best shape."""
        best = 0.0
        for program, x, w, flops in self._cases:
            begin = time.perf_counter()
            program(x, w).block_until_ready()
            best = max(best, flops / (time.perf_counter() - begin))
        return best


def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    return matmul(x, weight, here())


def _inputs(weight: jax.Array) -> int:
    """Width of what a projection reads."""
    return weight.shape[1 if here().out_in else 0]


def _chain(x: jax.Array, weights: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    for gate, down in weights:
        x = _matmul(_matmul(x, gate), down)
    return x


@dataclasses.dataclass(frozen=True)
class LayerSeconds:
    """Seconds of one layer's matmuls, and of the head's."""

    layer: float
    head: float


class LayerTimes:
    """The matmuls of a whole model alone, over the weights it has resident."""

    def __init__(self, units: Sequence[Layer], row_counts: Sequence[int]):
        """Compiles them for each number of rows."""
        layers = [u for u in units if u.signature.attentions or u.signature.kind == "layer"]
        self._layers = [
            [a for tensors in u.params for a in tensors.values() if a.ndim == 2] for u in layers
        ]
        self._count = sum(len(u.signature.attentions) for u in layers)
        self._head = units[-1].params[-1]["weight"]
        self._tied = units[-1].signature.tied
        self._programs = {}
        for rows in row_counts:
            widths = sorted({_inputs(w) for ws in self._layers for w in ws})
            xs = {w: jnp.full((rows, w), 0.01, jnp.float32) for w in widths}
            x = jnp.full((rows, units[0].signature.hidden_size), 0.01, jnp.float32)
            self._programs[rows] = (
                jax.jit(_sums).lower(xs, self._layers).compile(),
                xs,
                jax.jit(self._logits).lower(x, self._head).compile(),
                x,
            )

    def measure(self, rows: int) -> LayerSeconds:
        """One pass of `rows` rows."""
        layers, xs, head, x = self._programs[rows]
        begin = time.perf_counter()
        jax.block_until_ready(layers(xs, self._layers))
        middle = time.perf_counter()
        head(x, self._head).block_until_ready()
        return LayerSeconds((middle - begin) / self._count, time.perf_counter() - middle)

    def _logits(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        return matmul(x, weight, here(), transposed=True if self._tied else None)


def _sums(xs: Mapping[int, jax.Array], layers: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """Every matmul of every layer, each kept from being dropped by a sum of its result; a tiny term
    of the one before keeps them in sequence, as they are in a model."""
    out, link = [], jnp.float32(0)
    for weights in layers:
        for w in weights:
            link = _matmul(xs[_inputs(w)] + link * 1e-30, w).sum()
            out.append(link)
    return out
