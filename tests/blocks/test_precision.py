"""Products of float32 say that they are exact: by default TPUs multiply bfloat16, GPUs TensorFloat-32."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jblock.blocks.platform import Platform
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import (
    AttentionSpec,
    ExpertSpec,
    FfnSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    UnembeddingSpec,
)
from jblock.engine.adapters.slot_layout import abstract_tables
from jblock.engine.config import Bucket
from jblock.engine.kv_cache.spec import PoolShape
from jblock.engine.programs import forward as programs
from jblock.engine.signature import Signature, TableForm
from jblock.engine.weights.params import abstract_params
from jblock.pallas_kernels.backends import backend_of
from tests.blocks.test_platform import ELSEWHERE, on

WIDTH = 128
HEAD = (
    NormSpec(hidden_size=WIDTH, eps=1e-5),
    UnembeddingSpec(hidden_size=WIDTH, vocab_size=256),
)
ATTENTION = AttentionSpec(
    hidden_size=WIDTH, num_heads=4, num_kv_heads=2, head_dim=32, norm_eps=1e-5, rope=RopeSpec()
)
FFN = FfnSpec(hidden_size=WIDTH, intermediate_size=WIDTH, norm_eps=1e-5)
FEW_BITS = FfnSpec(
    hidden_size=WIDTH,
    intermediate_size=WIDTH,
    norm_eps=1e-5,
    quant=QuantSpec(bits=8, group=WIDTH),
)
ROUTER = RouterSpec(hidden_size=WIDTH, num_experts=2, top_k=1, norm_eps=1e-5, shared=True)
EXPERT = ExpertSpec(hidden_size=WIDTH, intermediate_size=WIDTH)
BOTTLENECK = "bottleneck.sum.relu"
# Components, and what of each has tables.
LAYERS = {
    "plain": ((ATTENTION, ()), (FFN, ())),
    "deltas": ((ATTENTION, (BOTTLENECK, "q")), (FFN, (BOTTLENECK, "up", "up.bits2"))),
    "few bits": ((FEW_BITS, ()),),
    "mixture": ((ROUTER, ()), *[(EXPERT, ())] * 3),
    "mixture with deltas": ((ROUTER, ("router",)), *[(EXPERT, ("up",))] * 3),
}


def signature_of(parts: Any, dtype: str) -> Signature:
    forms = (TableForm(targets=t, slots=3, pieces=5, places=3) if t else None for _, t in parts)
    return Signature(specs=tuple(s for s, _ in parts), forms=tuple(forms), dtype=dtype)


def layer(kind: Platform, name: str, dtype: str, bucket: Bucket) -> Any:
    """The jaxpr of a layer, KV pages of the dtype of its weights."""
    signature, backend = signature_of(LAYERS[name], dtype), backend_of(kind.name)
    pool = PoolShape(
        num_pages=5,
        page_size=32,
        num_kv_heads=2,
        head_dim=32,
        dtype=dtype,
        backend=backend,
    )
    s, q = bucket.num_seqs, bucket.q_len
    shape = jax.ShapeDtypeStruct
    return jax.make_jaxpr(programs.segment_program([signature], bucket, kind, backend))(
        (abstract_params(signature, on(kind)),),
        (abstract_tables(signature, on(kind)),),
        shape((64, WIDTH), jnp.float32),
        pool.abstract_arrays() if signature.attentions else (),
        shape((s, programs.INDEX_COLUMNS + 2 * q), jnp.int32),
        shape((len(signature.attentions), s, 2), jnp.int32),
    )


def head(kind: Platform, dtype: str) -> Any:
    signature = signature_of([(s, ()) for s in HEAD], dtype)
    return jax.make_jaxpr(programs.head_program(signature, Bucket(4, 1), kind))(
        abstract_params(signature, on(kind)),
        ({}, {}),
        jax.ShapeDtypeStruct((64, WIDTH), jnp.float32),
        jax.ShapeDtypeStruct((4, programs.INDEX_COLUMNS + 2), jnp.int32),
    )


def products(jaxpr: Any) -> Iterator[Any]:
    """Every dot_general, those in loops, branches and kernels too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(inner)


def hold(jaxpr: Any, *, least: int) -> None:
    """At least so many products are of float32, and all of those exact."""
    exact = jax.lax.Precision.HIGHEST
    stated = [
        eqn.params["precision"]
        for eqn in products(jaxpr)
        if all(v.aval.dtype == jnp.float32 for v in eqn.invars)
    ]
    assert len(stated) >= least and set(stated) <= {(exact, exact)}


@pytest.mark.parametrize("bucket", [Bucket(4, 1), Bucket(1, 16)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ELSEWHERE, ids=lambda k: k.name)
def test_layers_multiply_float32_as_it_is(kind, name, bucket):
    hold(layer(kind, name, "float32", bucket), least=3 if name != "few bits" else 0)


@pytest.mark.parametrize("kind", ELSEWHERE, ids=lambda k: k.name)
def test_heads_multiply_float32_as_it_is(kind):
    hold(head(kind, "float32"), least=1)


@pytest.mark.parametrize("kind", ELSEWHERE, ids=lambda k: k.name)
def test_routers_are_exact_where_weights_are_bfloat16(kind):
    hold(layer(kind, "mixture", "bfloat16", Bucket(4, 1)), least=2)


def test_what_is_not_stated_is_found():
    x = jnp.zeros((8, 8))
    with pytest.raises(AssertionError):
        hold(jax.make_jaxpr(jax.jit(functools.partial(jnp.dot, x)))(x), least=1)
