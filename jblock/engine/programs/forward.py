"""The functions that become executables: one step of one unit over registers, KV pools and rows.

Every function takes the batch as two int32 arrays built once per group of rows and step:

* `index [S, 4 + 2Q]`: start position, real tokens, delta slot, sequence slot, then Q register rows,
  then Q token ids (-1: take the sequence's last sampled token, which never left the device);
* `page_table [S, max_pages]`: physical KV pages.

Registers and KV pools are donated and returned, so a call updates them in place. Padding rows carry a
register row that does not exist: a gather clips it, a scatter drops it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jblock.blocks.attention import Attention
from jblock.blocks.embedding import Embedding, Head
from jblock.blocks.ffn import Ffn
from jblock.blocks.moe import Mixture
from jblock.blocks.platform import Platform
from jblock.blocks.rows import Rows
from jblock.blocks.spec import (
    AttentionSpec,
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    RouterSpec,
    StitchSpec,
    UnembeddingSpec,
)
from jblock.blocks.stitch import Stitch
from jblock.engine.config import Bucket
from jblock.engine.signature import Signature
from jblock.pallas_kernels.paged_attention.api import KvPages, paged_attention
from jblock.pallas_kernels.paged_attention.ragged import Ragged

INDEX_COLUMNS = 4


def unpack(
    index: jax.Array, bucket: Bucket, platform: Platform, mesh_axes: tuple[str, ...] = ()
) -> tuple[Rows, jax.Array, jax.Array, jax.Array]:
    """Splits `index` into the rows, sequence slots [S], register rows [S, Q] and token ids [S, Q]."""
    q = bucket.q_len
    rows = Rows(
        num_seqs=bucket.num_seqs,
        q_len=q,
        starts=index[:, 0],
        q_lens=index[:, 1],
        slots=index[:, 2],
        mesh_axes=mesh_axes,
        platform=platform,
    )
    registers = index[:, INDEX_COLUMNS : INDEX_COLUMNS + q]
    tokens = index[:, INDEX_COLUMNS + q : INDEX_COLUMNS + 2 * q]
    return rows, index[:, 3], registers, tokens


def embedding_program(
    signature: Signature, bucket: Bucket, platform: Platform
) -> Callable[..., jax.Array]:
    """(params, tables, registers, last_tokens [max_num_seqs], index) -> registers."""
    spec = signature.specs[0]
    if not isinstance(spec, EmbeddingSpec):
        raise ValueError(f"an embedding program needs an embedding, not a component of {spec.kind}")
    mesh_axes = signature.sharding.axes("vocab")

    def embed(
        params: Any, tables: Any, registers: jax.Array, last_tokens: jax.Array, index: jax.Array
    ):
        rows, seq_slots, register_rows, tokens = unpack(index, bucket, platform)
        tokens = jnp.where(tokens < 0, last_tokens[seq_slots][:, None], tokens).reshape(-1)
        with jax.named_scope("embedding"):
            embedding = Embedding(spec, params[0], signature.dtype, mesh_axes, tables[0])
            x = embedding(tokens, rows.positions.reshape(-1), rows)
        return registers.at[register_rows.reshape(-1)].set(x, mode="drop")

    return embed


def segment_program(
    signatures: Sequence[Signature], bucket: Bucket, platform: Platform, backend: str
) -> Callable[..., Any]:
    """(params, tables, registers, kv pools, index, page_table) -> (registers, kv pools).

    Runs one or more layers over the same rows, which stay in registers of the machine between them.
    Params and tables are one tuple a layer, of one dict each of `Signature.arguments`; pools one tuple of
    page arrays an attention, which `backend` of `paged_attention` lays and reads.
    """
    mesh_axes = signatures[0].sharding.axes("heads")
    expert_axes = signatures[0].sharding.axes("experts")

    def segment(
        params: Sequence[Sequence[Mapping[str, jax.Array]]],
        tables: Sequence[Sequence[Mapping[str, jax.Array]]],
        registers: jax.Array,
        pools: tuple[KvPages, ...],
        index: jax.Array,
        page_table: jax.Array,
    ):
        rows, _, register_rows, _ = unpack(index, bucket, platform, mesh_axes)
        register_rows = register_rows.reshape(-1)
        ragged = Ragged.grid(rows.starts, rows.q_lens, page_table, rows.q_len)
        x = registers.at[register_rows].get(mode="clip")
        updated: list[KvPages] = []
        components = [
            part
            for signature, *layer in zip(signatures, params, tables, strict=True)
            for part in zip(
                (signature.specs[i] for i, *_ in signature.arguments), *layer, strict=True
            )
        ]
        source = None  # What the next ffn reads, where that is not x.
        for at, (spec, tensors, deltas) in enumerate(components):
            if isinstance(spec, AttentionSpec):
                pages = pools[len(updated)]

                def attend(q, k, v, pages=pages, spec=spec):
                    q, k, v = rows.flat(q), rows.flat(k), rows.flat(v)
                    out, new = paged_attention(
                        q,
                        k,
                        v,
                        pages,
                        ragged,
                        sliding_window=spec.sliding_window,
                        softcap=spec.softcap,
                        scale=spec.scale,
                        backend=backend,
                        device_kind=platform.kind,
                    )
                    updated.append(new)
                    return rows.by_sequence(out)

                block = Attention(spec, tensors, deltas)
                with jax.named_scope("attention"):
                    source = block.ffn_source(x, rows)
                    x = block(x, rows, attend)
            elif isinstance(spec, FfnSpec):
                with jax.named_scope("ffn"):
                    x = Ffn(spec, tensors, deltas)(x, rows, source)
            elif isinstance(spec, RouterSpec):
                here = spec.num_experts // signatures[0].sharding.ways("experts") + spec.shared
                experts = components[at + 1 : at + 1 + here]
                with jax.named_scope("mixture"):
                    x = Mixture(spec, tensors, deltas, experts, expert_axes)(x, rows)
        return registers.at[register_rows].set(x, mode="drop"), tuple(updated)

    return segment


def stitch_program(signature: Signature, bucket: Bucket, platform: Platform) -> Callable[..., Any]:
    """(params, position int32 [], registers, index) -> registers.

    Registers are those of `signature.widths`, donated and returned: rows of the first go into the last.
    """
    spec = signature.specs[0]
    if not isinstance(spec, StitchSpec):
        raise ValueError(f"a stitch program needs a stitch, not a component of {spec.kind}")

    def stitch(
        params: Any, position: jax.Array, registers: tuple[jax.Array, ...], index: jax.Array
    ):
        rows, _, register_rows, _ = unpack(index, bucket, platform)
        register_rows = register_rows.reshape(-1)
        x = registers[0].at[register_rows].get(mode="clip")
        with jax.named_scope("stitch"):
            y = Stitch(spec, params[0])(x, position, rows)
        return (*registers[:-1], registers[-1].at[register_rows].set(y, mode="drop"))

    return stitch


def head_specs(signature: Signature) -> tuple[NormSpec, UnembeddingSpec]:
    """The two components of a head.

    Raises:
      ValueError: the signature is of something else.
    """
    match signature.specs:
        case (NormSpec() as norm, UnembeddingSpec() as unembedding):
            return norm, unembedding
    kinds = ", ".join(s.kind for s in signature.specs)
    raise ValueError(f"a head is a norm and an unembedding, not {kinds}")


def head_program(
    signature: Signature, bucket: Bucket, platform: Platform
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, tables, registers, index) -> logits float32 [S, vocab] of each sequence's last real row, and
    the leading columns of the index, so that one sampler serves every chunk length."""
    specs = head_specs(signature)

    def head(params: Any, tables: Any, registers: jax.Array, index: jax.Array):
        rows, _, register_rows, _ = unpack(index, bucket, platform)
        last = jnp.maximum(rows.q_lens - 1, 0)[:, None]
        row = jnp.take_along_axis(register_rows, last, axis=1)[:, 0]
        x = registers.at[row].get(mode="clip")
        with jax.named_scope("head"):
            logits = Head(
                specs,
                params,
                platform,
                tied=signature.tied,
                mesh_axes=signature.sharding.axes("vocab"),
                deltas=tables,
            )(x, dataclasses.replace(rows, q_len=1))
        return logits, index[:, :INDEX_COLUMNS]

    return head


@jax.named_scope("gather_pages")
def gather_pages_program(pools: Sequence[KvPages], pages: jax.Array) -> tuple[KvPages, ...]:
    """Copies pages out of every layer's arrays.

    Args:
      pools: every layer's page arrays (not donated).
      pages: int32 [n] page ids; 0, the null page, fills up.
    """
    return tuple(tuple(a.at[pages].get(mode="clip") for a in layer) for layer in pools)


@jax.named_scope("scatter_pages")
def scatter_pages_program(
    pools: Sequence[KvPages], copies: Sequence[KvPages], pages: jax.Array
) -> tuple[KvPages, ...]:
    """Overwrites whole pages with copies that `gather_pages_program` made.

    Args:
      pools: every layer's page arrays (donated).
      copies: n pages of every layer.
      pages: int32 [n] page ids; ids past the end are dropped.
    """
    return tuple(
        tuple(a.at[pages].set(c, mode="drop") for a, c in zip(layer, copy, strict=True))
        for layer, copy in zip(pools, copies, strict=True)
    )


@jax.named_scope("scrub")
def scrub_program(pools: Sequence[KvPages], pages: jax.Array) -> tuple[KvPages, ...]:
    """Zeroes pages that change hands: what an old tenant left can neither leak nor be 0 x NaN.

    Args:
      pools: every layer's page arrays (donated).
      pages: int32 [n] page ids; ids past the end are dropped.
    """
    return tuple(tuple(a.at[pages].set(0, mode="drop") for a in layer) for layer in pools)
