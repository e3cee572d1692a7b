"""Kernels that compute wrongly on the device at hand are found at start and replaced by XLA's form."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from jblock.cpu_kernels import targets
from jblock.pallas_kernels import backends, self_test
from jblock.pallas_kernels.grouped_block_matmul import xla as block_xla
from jblock.pallas_kernels.grouped_delta_matmul import xla as delta_xla
from jblock.pallas_kernels.paged_attention import xla as attention_xla
from jblock.pallas_kernels.quantized_matmul import xla as quantized_xla

XLA = {
    "paged_attention": attention_xla,
    "grouped_delta_matmul": delta_xla,
    "grouped_block_matmul": block_xla,
    "quantized_matmul": quantized_xla,
}


@pytest.fixture
def kernels(monkeypatch):
    """Serves the platform by XLA's own forms under another backend's name: kernels that are right, until one
    is put in another's place. A dict of them by op."""
    found = {
        op: types.SimpleNamespace(**vars(xla) | {"__name__": f"{op}.tpu"})
        for op, xla in XLA.items()
    }
    real = backends.module

    def module(op, backend=None):
        replaced = f"{op}/{backend}" in backends.replaced()
        return real(op, "xla") if replaced else found[op]

    monkeypatch.setattr(backends, "_replaced", set())
    monkeypatch.setattr(backends, "backend_of", lambda platform=None: "tpu")
    monkeypatch.setattr(backends, "module", module)
    return found


def test_what_is_right_stays(kernels):
    assert self_test.run("bfloat16") == {} and backends.replaced() == ()


def lacks_last_key(q, k, v, pages, ragged, **options):
    return attention_xla.paged_attention(
        q, k, v * (1 - (jnp.arange(len(v)) == len(v) - 1)[:, None, None]), pages, ragged, **options
    )


def nibbles_swapped(x, w_q, *rest, **options):
    if w_q.dtype == jnp.int4:
        w_q = w_q.reshape(len(w_q), -1, 2)[..., ::-1].reshape(w_q.shape)
    return quantized_xla.quantized_matmul(x, w_q, *rest, **options)


def not_a_number(y, *rest, **options):
    return delta_xla.grouped_delta_matmul(y, *rest, **options).at[3, 5].set(jnp.nan)


def does_not_compile(*args, **options):
    raise RuntimeError("ptxas: out of registers")


@pytest.mark.parametrize(
    "op, wrong, why",
    [
        ("paged_attention", lacks_last_key, "bfloat16 pages: off by"),
        ("quantized_matmul", nibbles_swapped, "weights of 4 bits: off by"),
        ("grouped_delta_matmul", not_a_number, "ranks beside rows without one: off by nan"),
        ("grouped_block_matmul", does_not_compile, "RuntimeError: ptxas: out of registers"),
    ],
)
def test_what_is_wrong_is_replaced_alone_and_named(kernels, caplog, op, wrong, why):
    setattr(kernels[op], op, wrong)
    failed = self_test.run("bfloat16")
    assert list(failed) == [op] and why in failed[op]
    assert backends.replaced() == (f"{op}/tpu",)
    assert backends.module(op, "tpu") is XLA[op]
    assert "XLA's form serves instead" in caplog.text and op in caplog.text
    assert self_test.run("bfloat16") == {}, "what stands for it is no kernel to be tested"


@pytest.mark.skipif(not targets.available(), reason="the extra jblock[cpu] is not installed")
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_the_cpus_kernels_pass(monkeypatch, kv_dtype):
    monkeypatch.setattr(backends, "_replaced", set())
    assert self_test.run(kv_dtype) == {}


@pytest.mark.skipif(not targets.available(), reason="the extra jblock[cpu] is not installed")
def test_code_that_returns_without_computing_is_replaced(monkeypatch):
    """As a renumbered stage of XLA's FFI would have it."""
    from jblock.cpu_kernels import ffi

    real = ffi.layout()
    enums = real.enums | {"ExecutionStage_EXECUTE": 77}
    monkeypatch.setattr(ffi, "layout", lambda: ffi.dataclasses.replace(real, enums=enums))
    monkeypatch.setattr(targets, "_ready", {})
    monkeypatch.setattr(targets, "_PREFIX", "jblock-broken", raising=False)
    monkeypatch.setattr(backends, "_replaced", set())
    failed = self_test.run("float32")
    assert {"paged_attention", "grouped_delta_matmul"} <= set(failed)
    assert np.all([f"{op}/cpu" in backends.replaced() for op in failed])
