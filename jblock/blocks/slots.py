"""What is a row's own: reading the slot tables of a component.

Every sequence names a slot; slot 0 has no delta. These tables belong to a component:

* pieces of PIECE_RANK rows, `[pieces, PIECE_RANK, width]`, which `pieces` (int32 [slots, turns], 0 where
  a slot has no more) names for each slot: both halves of LoRA pairs ("q.a", "q.b"), virtual tokens
  ("prompt", "prefix.k", "prefix.v"), both halves of bottlenecks and the biases inside, of width 1
  ("bottleneck.sum.relu.a", ".b", ".a_bias"). Piece 0 is all zeros;
* vectors, `[slots, width]`, NaN where a slot has none of its own: "q.bias" and "norm.weight" stand for
  the component's own, "q.scale" and "q.in_scale" for 1, "bottleneck.sum.relu.b_bias" for 0;
* codes of few bits, uint8 [places, out, m] ("q.bits2.codes"), and their scales, float32
  [places, out, groups] ("q.bits2.scales"), as BitDeltaSpec describes them; scales of 0 where there are
  none, and always in place 0. `places`, int32 [slots], names the place of each slot: few have one, and an
  entry is large;
* `virtual`, int32 [slots]: how many virtual tokens a slot's sequences begin with.

So rows of every kind of delta, and of none, go through one matmul of the shared weight. What a row
computes depends on its own slot alone.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jblock.blocks import grouped
from jblock.blocks.activation import ACTIVATIONS
from jblock.blocks.compressed_spec import BITS
from jblock.blocks.rows import Rows
from jblock.pallas_kernels.backends import backend_of
from jblock.pallas_kernels.grouped_delta_matmul.api import grouped_delta_matmul

PIECE_RANK = 8
_NO_TABLES: Mapping[str, jax.Array] = {}


class Slots:
    """The slot tables of one component by name, as the module's docstring has them."""

    def __init__(self, tables: Mapping[str, jax.Array] = _NO_TABLES):
        self._tables = tables

    @property
    def empty(self) -> bool:
        """Whether there are no tables."""
        return not self._tables

    def __contains__(self, name: str) -> bool:
        """Whether there is a table of this name."""
        return name in self._tables

    def own(self, name: str, base: jax.Array | None, rows: Rows | None) -> jax.Array | None:
        """A vector of the component: `base [width]` where nobody has one of their own, else [T, width]
        with each row's; no base is zeros."""
        return base if name not in self._tables else self._rows_of(name, base, rows)

    def scaled(self, name: str, x: jax.Array, rows: Rows | None) -> jax.Array:
        """[T, width] times each row's own scale, 1 without."""
        if name not in self._tables:
            return x
        return x * self._rows_of(name, jnp.ones((), x.dtype), rows)

    @jax.named_scope("lora")
    def add_lora(self, name: str, y: jax.Array, x: jax.Array, rows: Rows | None) -> jax.Array:
        """`y [T, out] + b @ (a @ x)` of each row's own pairs for projection `name`, x [T, in].

        The k-th piece of every sequence is added in turn k, for as many turns as the longest delta
        present has pieces, so that a batch reads what its own sequences hold. Kernels, and machine code of
        our own on CPU, take each sequence's pieces without turns.
        """
        if f"{name}.a" not in self._tables:
            return y
        rows, a = _known(rows), self._tables[f"{name}.a"]
        backend = backend_of(rows.platform.name)
        if backend == "cpu":
            b, pieces = self._tables[f"{name}.b"], self._tables["pieces"][rows.slots]
            sizes = jnp.full((rows.num_seqs,), rows.q_len, jnp.int32)
            return grouped_delta_matmul(y, x, a, b, pieces, sizes, backend=backend)
        if grouped.has_kernels(rows.platform):
            pieces = self._tables["pieces"]
            return grouped.add_pairs(y, x, a, self._tables[f"{name}.b"], pieces, rows)
        xs = rows.by_sequence(x)
        return self._add(name, y, rows, lambda piece: _product("sqi,sri->sqr", xs, a[piece]))

    @jax.named_scope("bottleneck")
    def add_residual(self, x: jax.Array, out: jax.Array, rows: Rows | None) -> jax.Array:
        """`x + out`, both [T, width], and what each row's own bottleneck adds to it (BottleneckSpec)."""
        y = total = x + out
        reads = {"sum": total, "output": out, "input": x}
        inside = [n for n in self._tables if n.endswith(".a_bias")]
        for name in sorted(n.removesuffix(".a_bias") for n in inside):
            _, read, activation = name.split(".")
            rows = _known(rows)
            zs, act = rows.by_sequence(reads[read]), ACTIVATIONS[activation]
            a, a_bias = self._tables[f"{name}.a"], self._tables[f"{name}.a_bias"]

            def inner(piece: jax.Array, zs=zs, act=act, a=a, a_bias=a_bias) -> jax.Array:
                return act(_product("sqi,sri->sqr", zs, a[piece]) + a_bias[piece][:, None, :, 0])

            y = self._add(name, y, rows, inner)
            y = y + self._rows_of(f"{name}.b_bias", None, rows)
        return y

    def add_bits(self, name: str, y: jax.Array, x: jax.Array, rows: Rows | None) -> jax.Array:
        """`y [T, out] + x @ d.T` with each row's own difference `d [out, in]` in few bits.

        A difference is widened only while it is used, once a call for all decoding rows of its place, or
        for each sequence of a prefill. So a call takes time by how many of its places have one.
        """
        for bits in BITS:
            if f"{name}.bits{bits}.codes" in self._tables:
                y = self._add_bits(f"{name}.bits{bits}", bits, y, x, _known(rows))
        return y

    def add_lookup(
        self, name: str, y: jax.Array, token_ids: jax.Array, rows: Rows | None
    ) -> jax.Array:
        """The same for a projection of one-hot rows: x is the token ids, int32 [T]."""
        if f"{name}.a" not in self._tables:
            return y
        rows, a = _known(rows), self._tables[f"{name}.a"]
        tokens = rows.by_sequence(token_ids)
        return self._add(name, y, rows, lambda piece: a[piece[:, None], :, tokens])

    def virtual(self, name: str, x: jax.Array, rows: Rows | None) -> jax.Array:
        """x [S, Q, width] with the slot's own rows in the places of its virtual tokens."""
        if name not in self._tables:
            return x
        rows = _known(rows)
        pieces = self._tables["pieces"][rows.slots]
        turn = jnp.minimum(rows.positions // PIECE_RANK, pieces.shape[1] - 1)
        piece = jnp.take_along_axis(pieces, turn, axis=1)
        mine = self._tables[name][piece, rows.positions % PIECE_RANK]
        count = self._tables["virtual"][rows.slots]
        return jnp.where((rows.positions < count[:, None])[:, :, None], mine, x)

    def _add_bits(self, table: str, bits: int, y: jax.Array, x: jax.Array, rows: Rows) -> jax.Array:
        codes, scales = self._tables[f"{table}.codes"], self._tables[f"{table}.scales"]
        places = self._tables["places"][rows.slots]
        there = scales[:, 0, 0][places] > 0

        def times(place: jax.Array, x: jax.Array) -> jax.Array:
            """[n, in] -> [n, out]"""
            packed = jax.lax.dynamic_index_in_dim(codes, place, keepdims=False)
            mine = jax.lax.dynamic_index_in_dim(scales, place, keepdims=False)
            planes = [(packed >> (bits * k)) & (2**bits - 1) for k in range(8 // bits)]
            levels = jnp.concatenate(planes, axis=1).astype(jnp.float32) - (2**bits - 1) / 2
            out, groups = mine.shape
            weight = (levels.reshape(out, groups, -1) * mine[:, :, None]).reshape(out, -1)
            return jax.lax.dot_general(
                x, weight, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
            )

        if rows.q_len == 1:
            order = jnp.arange(rows.num_seqs)
            earlier = (places[:, None] == places[None, :]) & (order[None, :] < order[:, None])
            first = there & ~jnp.any(earlier, axis=1)

            def add(i: jax.Array, y: jax.Array) -> jax.Array:
                def some(y: jax.Array) -> jax.Array:
                    return y + jnp.where((places == places[i])[:, None], times(places[i], x), 0.0)

                return jax.lax.cond(first[i], some, lambda y: y, y)

            return jax.lax.fori_loop(0, rows.num_seqs, add, y)
        xs = rows.by_sequence(x)

        def add_to(i: jax.Array, ys: jax.Array) -> jax.Array:
            def some(ys: jax.Array) -> jax.Array:
                mine = jax.lax.dynamic_index_in_dim(xs, i, keepdims=False)
                return ys.at[i].add(times(places[i], mine))

            return jax.lax.cond(there[i], some, lambda ys: ys, ys)

        return rows.flat(jax.lax.fori_loop(0, rows.num_seqs, add_to, rows.by_sequence(y)))

    def _rows_of(self, name: str, base: jax.Array | None, rows: Rows | None) -> jax.Array:
        rows = _known(rows)
        mine = self._tables[name][rows.slots]  # [S, width]
        mine = jnp.where(jnp.isnan(mine), 0.0 if base is None else base, mine)
        if rows.q_len == 1:
            return mine
        wide = (rows.num_seqs, rows.q_len, mine.shape[1])
        return rows.flat(jnp.broadcast_to(mine[:, None], wide))

    def _add(
        self, name: str, y: jax.Array, rows: Rows, inner_of: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """`inner_of` takes a piece a sequence, int32 [S], to [S, Q, PIECE_RANK]."""
        b, pieces = self._tables[f"{name}.b"], self._tables["pieces"][rows.slots]

        def add(turn: jax.Array, ys: jax.Array) -> jax.Array:
            piece = jax.lax.dynamic_index_in_dim(pieces, turn, axis=1, keepdims=False)
            inner = inner_of(piece)
            if rows.q_len == 1:
                # One row a sequence: a fused sum beats a batch of tiny matmuls.
                return ys + jnp.sum(inner[:, 0, :, None] * b[piece], axis=1)[:, None, :]
            return ys + _product("sqr,sro->sqo", inner, b[piece])

        turns = jnp.max(jnp.sum(pieces > 0, axis=1))
        return rows.flat(jax.lax.fori_loop(0, turns, add, rows.by_sequence(y)))


# What is a row's own is float32, and stays so: by default TPUs and GPUs round it before they multiply.
_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _known(rows: Rows | None) -> Rows:
    if rows is None:
        raise ValueError("a component with slot tables needs to know its rows")
    return rows
