"""The target decides the form of a block's program, not the machine that compiles it."""

import types

import jax
import jax.numpy as jnp
import pytest

from jblock.blocks import platform
from jblock.blocks.linear import matmul
from jblock.blocks.platform import Platform
from jblock.blocks.spec import AttentionSpec, EmbeddingSpec, FfnSpec, RopeSpec
from jblock.engine.config import Bucket
from jblock.engine.kv_cache.spec import PoolShape
from jblock.engine.programs import forward as programs
from jblock.engine.signature import Signature
from jblock.engine.weights.params import abstract_params
from jblock.parallel.placement import Placement

AVX512, PLAIN = Platform("cpu", "cpu", avx512=True), Platform("cpu", "cpu")
ELSEWHERE = [Platform("tpu", "TPU v5 lite"), Platform("gpu", "NVIDIA H200")]
KINDS = [AVX512, PLAIN, *ELSEWHERE]


class Elsewhere(Placement):
    """The default device, taken for one of another kind."""

    platform = None


def on(kind: Platform) -> Placement:
    """A placement whose programs are for this kind of device."""
    placement = Elsewhere()
    object.__setattr__(placement, "platform", kind)
    return placement


def lowered(kind: Platform, rows: int, dtype: str) -> str:
    """StableHLO of one layer of decoding."""
    specs = (
        AttentionSpec(
            hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope=RopeSpec()
        ),
        FfnSpec(hidden_size=32, intermediate_size=48, norm_eps=1e-5),
    )
    signature = Signature(specs=specs, forms=(None, None), dtype=dtype)
    pool = PoolShape(num_pages=5, page_size=8, num_kv_heads=2, head_dim=8, backend="xla")
    program = programs.segment_program([signature], Bucket(rows, 1), kind, "xla")
    shape = jax.ShapeDtypeStruct
    arguments = (
        (abstract_params(signature, on(kind)),),
        (({}, {}),),
        shape((8, 32), jnp.float32),
        pool.abstract_arrays(),
        shape((rows, programs.INDEX_COLUMNS + 2), jnp.int32),
        shape((1, rows, 2), jnp.int32),
    )
    return jax.jit(program).lower(*arguments).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ELSEWHERE, ids=lambda k: k.name)
def test_programs_for_other_targets_have_no_form_of_this_cpu(kind, dtype, monkeypatch):
    text = lowered(kind, 4, dtype)
    assert "optimization_barrier" not in text
    # Rows are padded to eight for CPUs alone.
    weights = "bf16" if dtype == "bfloat16" else "f32"
    assert (
        f"tensor<4x32x{weights}>, tensor<48x32x{weights}>" in text
        and "tensor<8x32xbf16>" not in text
    )
    for there in (True, False):
        monkeypatch.setattr(platform, "_cpu_has", lambda feature, there=there: there)
        assert lowered(kind, 4, dtype) == text


def test_a_cpu_program_has_the_form_of_its_cpu():
    assert "optimization_barrier" in lowered(AVX512, 4, "float32")
    assert "tensor<4x32xf32>, tensor<32x48xf32>" in lowered(PLAIN, 4, "float32")
    for kind in (AVX512, PLAIN):
        assert "tensor<8x32xbf16>" in lowered(kind, 4, "bfloat16")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensors_lie_as_the_target_reads_them(kind):
    ffn = FfnSpec(hidden_size=32, intermediate_size=48, norm_eps=1e-5)
    embedding = EmbeddingSpec(vocab_size=64, hidden_size=32)
    (of_ffn,), (of_embedding,) = (
        abstract_params(Signature(specs=(s,), forms=(None,), dtype="bfloat16"), on(kind))
        for s in (ffn, embedding)
    )
    assert of_ffn["up.weight"].shape == ((32, 48) if kind == PLAIN else (48, 32))
    assert of_embedding["weight"].dtype == "bfloat16"


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_is_the_same_product(kind, dtype):
    x = jax.random.normal(jax.random.key(0), (3, 32))
    weight = jax.random.normal(jax.random.key(1), (48, 32)).astype(dtype)
    wanted = x.astype(dtype).astype("float32") @ weight.astype("float32").T
    got = matmul(x, weight if kind.out_in else weight.T, kind)
    assert got.dtype == jnp.float32 and jnp.abs(got - wanted).max() < 2e-5 * jnp.abs(wanted).max()
    assert (matmul(x, weight, kind, transposed=True).shape) == (3, 48)


def test_a_device_elsewhere_has_no_feature_of_this_cpu(monkeypatch):
    monkeypatch.setattr(platform, "_cpu_has", lambda feature: True)
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    assert Platform.of(tpu) == Platform("tpu", "TPU v5 lite")
    assert Platform.of(jax.local_devices(backend="cpu")[0]).avx512
