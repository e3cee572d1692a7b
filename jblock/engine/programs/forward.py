"""The functions that become executables: layers, embeddings and heads over registers, KV pools and rows.

Every function takes the batch as int32 arrays:

* `index [S, 4 + 2Q]`, built once per group of rows and step: start position, real tokens, delta slot,
  sequence slot, then Q register rows, then Q token ids (-1: take the sequence's last sampled token, which
  never left the device);
* `page_tables [L, S, max_pages]`: the KV pages of each attention the program runs, page ids of one pool.

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
from jblock.engine.programs import sampling
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


@dataclasses.dataclass
class Pages:
    """A pool as it goes through the layers of a program: each writes its keys and values, then hands it on.

    Attributes:
      arrays: as the last layer left them.
      layers: attentions passed.
    """

    arrays: KvPages
    layers: int = 0


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
    """(params, tables, registers, pool, index, page_tables) -> (registers, pool).

    Runs one or more layers over the same rows, which stay in registers of the machine between them.
    Params and tables are one tuple a layer, of one dict each of `Signature.arguments`; the pool is the page
    arrays that all attentions of the program have their pages in, as `backend` of `paged_attention` lays
    them. Without an attention pool and page tables are ().
    """
    mesh_axes = signatures[0].sharding.axes("heads")
    expert_axes = signatures[0].sharding.axes("experts")

    def segment(
        params: Sequence[Sequence[Mapping[str, jax.Array]]],
        tables: Sequence[Sequence[Mapping[str, jax.Array]]],
        registers: jax.Array,
        pool: KvPages,
        index: jax.Array,
        page_tables: jax.Array,
    ):
        rows, _, register_rows, _ = unpack(index, bucket, platform, mesh_axes)
        register_rows = register_rows.reshape(-1)
        x = registers.at[register_rows].get(mode="clip")
        kv = Pages(pool)
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
                ragged = Ragged.grid(rows.starts, rows.q_lens, page_tables[kv.layers], rows.q_len)

                def attend(q, k, v, ragged=ragged, spec=spec):
                    q, k, v = rows.flat(q), rows.flat(k), rows.flat(v)
                    out, kv.arrays = paged_attention(
                        q,
                        k,
                        v,
                        kv.arrays,
                        ragged,
                        sliding_window=spec.sliding_window,
                        softcap=spec.softcap,
                        scale=spec.scale,
                        backend=backend,
                        device_kind=platform.kind,
                    )
                    kv.layers += 1
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
        return registers.at[register_rows].set(x, mode="drop"), kv.arrays

    return segment


def stitch_program(signature: Signature, bucket: Bucket, platform: Platform) -> Callable[..., Any]:
    """(params, positions int32 [S], registers, index) -> registers.

    Registers are those of `signature.widths`, donated and returned: rows of the first go into the last.
    """
    spec = signature.specs[0]
    if not isinstance(spec, StitchSpec):
        raise ValueError(f"a stitch program needs a stitch, not a component of {spec.kind}")

    def stitch(
        params: Any, positions: jax.Array, registers: tuple[jax.Array, ...], index: jax.Array
    ):
        rows, _, register_rows, _ = unpack(index, bucket, platform)
        register_rows = register_rows.reshape(-1)
        x = registers[0].at[register_rows].get(mode="clip")
        with jax.named_scope("stitch"):
            y = Stitch(spec, params[0])(x, jnp.repeat(positions, bucket.q_len), rows)
        return (*registers[:-1], registers[-1].at[register_rows].set(y, mode="drop"))

    return stitch


def head_of(signature: Signature, platform: Platform) -> Callable[[Any, Any], Head]:
    """(params, tables) -> the module of a head.

    Raises:
      ValueError: the signature is of something else.
    """
    match signature.specs:
        case (NormSpec() as norm, UnembeddingSpec() as unembedding):
            return lambda params, tables: Head(
                (norm, unembedding),
                params,
                platform,
                tied=signature.tied,
                mesh_axes=signature.sharding.axes("vocab"),
                deltas=tables,
            )
    kinds = ", ".join(s.kind for s in signature.specs)
    raise ValueError(f"a head is a norm and an unembedding, not {kinds}")


def head_program(
    signature: Signature, bucket: Bucket, platform: Platform
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, tables, registers, index) -> logits float32 [S, vocab] of each sequence's last real row, and
    the leading columns of the index, so that one sampler serves every chunk length."""
    make = head_of(signature, platform)

    def head(params: Any, tables: Any, registers: jax.Array, index: jax.Array):
        rows, _, register_rows, _ = unpack(index, bucket, platform)
        last = jnp.maximum(rows.q_lens - 1, 0)[:, None]
        row = jnp.take_along_axis(register_rows, last, axis=1)[:, 0]
        x = registers.at[row].get(mode="clip")
        with jax.named_scope("head"):
            logits = make(params, tables)(x, dataclasses.replace(rows, q_len=1))
        return logits, index[:, :INDEX_COLUMNS]

    return head


def greedy_head_program(
    signature: Signature, bucket: Bucket, platform: Platform
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, tables, registers, last_tokens, index) -> (last_tokens, packed): `head_program` and
    `sampling.greedy` in one, to the bit what they give one after the other."""
    head = head_program(signature, bucket, platform)

    def both(params: Any, tables: Any, registers: jax.Array, last_tokens: jax.Array, index: Any):
        logits, meta = head(params, tables, registers, index)
        logits = jax.lax.optimization_barrier(logits)
        return sampling.greedy(logits, logits, last_tokens, meta)

    return both
