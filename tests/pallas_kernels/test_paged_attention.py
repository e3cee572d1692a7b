"""The op's XLA backend against the reference, its arguments, and how 8-bit KV is stored.

`make test` takes every third case of the table, rounded to sizes that many share, `make test-long` all in
their own sizes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.cpu_kernels import targets
from jblock.pallas_kernels.paged_attention import api
from jblock.pallas_kernels.paged_attention.quantize import quantize
from jblock.pallas_kernels.paged_attention.ragged import Ragged
from tests.pallas_kernels.attention_cases import CASES, FORMS, Case, check, run
from tests.pallas_kernels.tpu_interpreter import FAST

PAGES = functools.partial(api.abstract_pages, backend="xla")
ATTEND = jax.jit(
    functools.partial(api.paged_attention, backend="xla"),
    static_argnames=("sliding_window", "softcap", "scale"),
    compiler_options=FAST,
)


def test_there_are_enough_cases():
    assert len(set(CASES)) == len(CASES) >= 60
    assert {c.form for c in CASES} == set(FORMS)


def hold(case: Case, seed: int = 0, rounded: bool = False) -> None:
    # Computed in float32 whatever the pages hold, so only a result in bfloat16 needs leeway.
    got, wanted = run(case, PAGES, ATTEND, seed, rounded)
    check(case, got, wanted, 2e-5 if case.q == "float32" and case.kv != "bfloat16" else None)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_matches_reference(case):
    hold(case, rounded=True)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference_in_sizes_of_its_own(case):
    hold(case)


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 4)), min_size=3, max_size=3),
    form=st.sampled_from(FORMS),
    window=st.sampled_from([None, 5]),
    kv=st.sampled_from(["float32", "int8"]),
    seed=st.integers(0, 99),
)
def test_matches_reference_on_random_batches(sequences, form, window, kv, seed):
    # The last sequence fixes max_q_len and the size of the page table, and so the program.
    case = Case((*sequences, (14, 4)), form, window=window, kv=kv, page_size=4, head_dim=8)
    hold(case, seed)


@pytest.mark.parametrize("dtype, step", [("int8", 1 / 127), ("float8_e4m3fn", 1 / 14)])
def test_quantized_rows_come_back_within_half_a_step(dtype, step):
    x = np.random.default_rng(0).standard_normal((50, 3, 16)).astype(np.float32) * 1e3
    x[7] = 0
    values, scale = quantize(jnp.asarray(x), dtype)
    assert values.dtype == jnp.dtype(dtype) and scale.shape == (50, 3)
    back = np.asarray(values, np.float32) * np.asarray(scale)[..., None]
    largest = np.abs(x).max(-1, keepdims=True)
    assert np.all(np.abs(back - x) <= 0.501 * step * largest)
    assert not back[7].any()


def arrays(rows=4, heads=4, kv_heads=2, d=16):
    q = jnp.zeros((rows, heads, d))
    k = jnp.zeros((rows, kv_heads, d))
    pages = tuple(jnp.zeros(a.shape, a.dtype) for a in PAGES(4, 8, kv_heads, d))
    return q, k, k, pages


@pytest.mark.parametrize(
    "change, says",
    [
        ({"rows": 5}, "has no 5 rows"),
        ({"kv_heads": 3}, "do not fit"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
    ],
)
def test_bad_arguments_are_refused(change, says):
    options = {k: v for k, v in change.items() if k in ("sliding_window", "softcap")}
    shapes = {k: v for k, v in change.items() if k not in options}
    zeros = jnp.zeros(2, jnp.int32)
    ragged = Ragged.grid(zeros, zeros, jnp.zeros((2, 1), jnp.int32), 2)
    with pytest.raises(ValueError, match=says):
        api.paged_attention(*arrays(**shapes), ragged, **options)


def test_a_dtype_kv_cannot_have_is_refused():
    with pytest.raises(ValueError, match="KV dtype 'float16' is not known; give one of float32"):
        api.abstract_pages(4, 8, 2, 16, dtype="float16")


def test_every_platform_has_a_backend():
    assert api.backend_of("cpu") == ("cpu" if targets.available() else "xla")
    assert api.backend_of("a platform of tomorrow") == "xla"
    assert api.backend_of() in api.BACKENDS


def test_the_target_decides_whose_tuned_sizes_are_taken(monkeypatch):
    """And not the device of the process that compiles."""
    from jblock.pallas_kernels.paged_attention import tpu

    taken = {}
    monkeypatch.setattr(tpu, "paged_attention", lambda *args, **options: taken.update(options))
    q = jax.ShapeDtypeStruct((2, 4, 128), "float32")
    kv = jax.ShapeDtypeStruct((2, 2, 128), "float32")
    ids = np.ones((2,), np.int32)
    ragged = Ragged.grid(ids, ids, np.ones((2, 3), np.int32), 1)
    pages = api.abstract_pages(9, 8, 2, 128, backend="tpu")
    api.paged_attention(q, kv, kv, pages, ragged, backend="tpu", device_kind="TPU v5 lite")
    assert taken["device_kind"] == "TPU v5 lite"
