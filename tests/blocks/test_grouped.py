"""Blocks on a platform with kernels say the same as on a CPU: the kernels in jax's TPU interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from jblock.blocks import grouped
from jblock.blocks.linear import Linear
from jblock.blocks.moe import Mixture
from jblock.blocks.platform import Platform
from jblock.blocks.rows import Rows
from jblock.blocks.slots import PIECE_RANK
from jblock.blocks.spec import ExpertSpec, RouterSpec

CPU, TPU = Platform("cpu", "cpu", avx512=True), Platform("tpu", "none")


def rows_of(num_seqs, q_len, q_lens, slots, platform):
    return Rows(
        num_seqs=num_seqs,
        q_len=q_len,
        starts=jnp.zeros(num_seqs, jnp.int32),
        q_lens=jnp.asarray(q_lens, jnp.int32),
        slots=jnp.asarray(slots, jnp.int32),
        platform=platform,
    )


def both(run):
    """What `run(platform)` gives on a CPU and on a TPU."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = np.asarray(jax.jit(run, static_argnums=0)(TPU))
    return np.asarray(jax.jit(run, static_argnums=0)(CPU)), got


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_runs_are_of_equal_neighbors(values):
    slots, sizes = (np.asarray(a).tolist() for a in grouped.runs(jnp.asarray(values, jnp.int32)))
    assert np.repeat(slots, sizes).tolist() == values
    count = sum(n > 0 for n in sizes)
    assert all(sizes[:count]) and slots[:count] == [
        v for i, v in enumerate(values) if i == 0 or v != values[i - 1]
    ]


@pytest.mark.parametrize("q_len", [1, 4])
def test_adapters_of_a_batch(q_len):
    rng = np.random.default_rng(0)
    params = {"q.weight": jnp.asarray(rng.standard_normal((24, 16)), jnp.float32)}
    a, b = (rng.standard_normal((6, PIECE_RANK, n)).astype("f4") / 4 for n in (16, 24))
    a[0] = b[0] = 0
    tables = {"q.a": jnp.asarray(a), "q.b": jnp.asarray(b)}
    tables["pieces"] = jnp.asarray([[0, 0], [1, 2], [3, 0], [4, 5]], jnp.int32)
    x = jnp.asarray(rng.standard_normal((6 * q_len, 16)), jnp.float32)
    q_lens = np.asarray([1, q_len, 1, q_len, 1, 0])

    def run(platform):
        rows = rows_of(6, q_len, q_lens, [1, 1, 0, 2, 3, 0], platform)
        return rows.by_sequence(Linear(params, tables, "q")(x, rows))

    wanted, got = both(run)
    for s, n in enumerate(q_lens):
        np.testing.assert_allclose(got[s, :n], wanted[s, :n], atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.long)])
def test_experts_of_a_batch(adapted):
    rng = np.random.default_rng(0)
    spec = RouterSpec(
        hidden_size=16, num_experts=4, top_k=2, norm_eps=1e-5, normalize=True, shared=True
    )
    expert = ExpertSpec(hidden_size=16, intermediate_size=24)

    def draw(spec):
        return {
            n: jnp.asarray(rng.standard_normal(s) / 3, jnp.float32)
            for n, s in spec.tensors().items()
        }

    router, experts = draw(spec), [draw(expert) for _ in range(spec.followers)]
    table = {
        "pieces": jnp.asarray([[0], [1]], jnp.int32),
        "gate.a": jnp.zeros((2, PIECE_RANK, 16)).at[1].set(rng.standard_normal(16) / 4),
        "gate.b": jnp.zeros((2, PIECE_RANK, 24)).at[1].set(rng.standard_normal(24) / 4),
    }
    x = jnp.asarray(rng.standard_normal((6, 16)), jnp.float32).at[5].set(jnp.nan)

    def run(platform):
        parts = [(expert, e, table if adapted and i == 1 else {}) for i, e in enumerate(experts)]
        rows = rows_of(2, 3, [3, 2], [1, 0], platform)
        return Mixture(spec, router, {}, parts)(x, rows)

    wanted, got = both(run)
    np.testing.assert_allclose(got[:5], wanted[:5], atol=2e-5 * np.abs(wanted[:5]).max())


def test_a_cpu_goes_its_own_way(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(grouped, "add_pairs", refuse)
    monkeypatch.setattr(grouped, "multiply", refuse)
    assert not grouped.has_kernels(CPU) and grouped.has_kernels(TPU)
    tables = {
        "q.a": jnp.zeros((2, PIECE_RANK, 8)),
        "q.b": jnp.zeros((2, PIECE_RANK, 8)),
        "pieces": jnp.zeros((1, 1), jnp.int32),
    }
    rows = rows_of(1, 1, [1], [0], CPU)
    assert Linear({"q.weight": jnp.eye(8)}, tables, "q")(jnp.ones((1, 8)), rows).shape == (1, 8)
    with pytest.raises(AssertionError, match="a kernel was called"):
        rows = rows_of(1, 1, [1], [0], TPU)
        Linear({"q.weight": jnp.eye(8)}, tables, "q")(jnp.ones((1, 8)), rows)
