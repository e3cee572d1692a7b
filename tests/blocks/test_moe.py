"""The mixture of experts against a plain sum over experts, and rows that do not feel each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jblock.blocks import grouped
from jblock.blocks.moe import Mixture, group_size
from jblock.blocks.platform import here
from jblock.blocks.rows import Rows
from jblock.blocks.slots import PIECE_RANK
from jblock.blocks.spec import ExpertSpec, RouterSpec

HIDDEN, WIDTH, EXPERTS = 16, 12, 5
SPEC = RouterSpec(
    hidden_size=HIDDEN, num_experts=EXPERTS, top_k=2, norm_eps=1e-5, normalize=True, shared=True
)
EXPERT = ExpertSpec(hidden_size=HIDDEN, intermediate_size=WIDTH)


def laid(tensors):
    """Matrices as this machine's matmuls want them."""
    return {n: jnp.asarray(t if here().out_in or t.ndim == 1 else t.T) for n, t in tensors.items()}


def draw(spec, rng):
    return {n: rng.standard_normal(s).astype("f4") / 3 for n, s in spec.tensors().items()}


@pytest.fixture(scope="module")
def mixture():
    """(weights as numpy, the jitted block (x, starts, q_lens, slots) -> rows of a 4 x 8 grid)."""
    rng = np.random.default_rng(0)
    router, experts = draw(SPEC, rng), [draw(EXPERT, rng) for _ in range(SPEC.followers)]
    # Slot 1 has an adapter of one piece on expert 0's gate.
    tables = {
        "pieces": jnp.asarray([[0], [1]], jnp.int32),
        "gate.a": jnp.zeros((2, PIECE_RANK, HIDDEN)).at[1].set(rng.standard_normal(HIDDEN) / 4),
        "gate.b": jnp.zeros((2, PIECE_RANK, WIDTH)).at[1].set(rng.standard_normal(WIDTH) / 4),
    }

    @jax.jit
    def run(x, q_lens, slots):
        parts = [(EXPERT, laid(e), tables if i == 0 else {}) for i, e in enumerate(experts)]
        rows = Rows(num_seqs=4, q_len=8, starts=jnp.zeros(4, jnp.int32), q_lens=q_lens, slots=slots)
        return Mixture(SPEC, laid(router), {}, parts)(x, rows)

    return router, experts, tables, run


def plain(x, router, experts, delta):
    """One row in float64."""
    norm = x / np.sqrt(np.mean(x**2) + SPEC.norm_eps) * router["norm.weight"]
    scores = router["router.weight"] @ norm
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    best = np.argsort(-weights)[: SPEC.top_k]

    def expert(i):
        gate = experts[i]["gate.weight"] @ norm + (delta @ norm if i == 0 else 0)
        up = experts[i]["up.weight"] @ norm
        return experts[i]["down.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    shared = expert(EXPERTS) / (1 + np.exp(-router["shared_gate.weight"][0] @ norm))
    return x + shared + sum(weights[i] / weights[best].sum() * expert(i) for i in best)


def test_against_a_plain_sum(mixture):
    router, experts, tables, run = mixture
    x = np.random.default_rng(1).standard_normal((32, HIDDEN)).astype("f4")
    got = run(x, jnp.full(4, 8, jnp.int32), jnp.asarray([0, 1, 0, 1], jnp.int32))
    adapter = np.asarray(tables["gate.b"][1], "f8").T @ np.asarray(tables["gate.a"][1], "f8")
    for row in range(32):
        wanted = plain(x[row].astype("f8"), router, experts, adapter * (row // 8 % 2))
        np.testing.assert_allclose(got[row], wanted, atol=2e-5)


def test_a_row_does_not_feel_the_others(mixture):
    run = mixture[3]
    rng = np.random.default_rng(2)
    x = rng.standard_normal((32, HIDDEN)).astype("f4")
    slots = jnp.asarray([0, 1, 0, 0], jnp.int32)
    alone = np.asarray(run(x, jnp.asarray([8, 8, 0, 0], jnp.int32), slots))
    for seed in range(5):
        others = x.copy()
        # All alike crowd onto the same experts; NaN is what a broken tenant brings.
        others[16:] = rng.standard_normal(HIDDEN) if seed else np.nan
        got = np.asarray(run(others, jnp.full(4, 8, jnp.int32), slots))
        np.testing.assert_array_equal(got[:16], alone[:16])


def test_an_expert_without_rows_takes_no_time():
    """One row, whose experts' products could all be made ahead of the loops over groups."""
    hidden, width = 256, 512
    spec = RouterSpec(hidden_size=hidden, num_experts=2, top_k=1, norm_eps=1e-5)
    expert = ExpertSpec(hidden_size=hidden, intermediate_size=width)
    one = jnp.ones(1, jnp.int32)
    rows = Rows(num_seqs=1, q_len=1, starts=0 * one, q_lens=one, slots=0 * one)
    rng = np.random.default_rng(0)
    parts = [laid(draw(spec, rng)), *(laid(draw(expert, rng)) for _ in range(2))]

    def run(x, parts):
        return Mixture(spec, parts[0], {}, [(expert, p, {}) for p in parts[1:]])(x, rows)

    text = jax.jit(run).lower(jnp.ones((1, hidden)), parts).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    assert "jit(run)/while" in entry
    # Outside of the loops there is the router alone.
    assert sum(f"{width}" in line for line in entry.splitlines() if " dot(" in line) == 0


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (4, 4), (16, 8), (64, 32), (128, 64), (256, 64), (1024, 256)]
)
def test_group_sizes(rows, size):
    spec = RouterSpec(hidden_size=8, num_experts=8, top_k=2, norm_eps=1e-5)
    assert group_size(rows, spec) == size


def test_experts_that_are_split_go_through_the_grouped_kernel_too(monkeypatch):
    """Two parts of four experts, each part's rows in one product a projection, sum to the whole."""
    spec = RouterSpec(hidden_size=HIDDEN, num_experts=4, top_k=2, norm_eps=1e-5, shared=False)
    rng = np.random.default_rng(3)
    router, experts = laid(draw(spec, rng)), [laid(draw(EXPERT, rng)) for _ in range(4)]
    calls = []

    def multiply(x, weights, sizes, platform):
        calls.append(len(weights))
        outs = [w.shape[0] if here().out_in else w.shape[1] for w in weights]
        assert len(set(outs)) == 1
        ends = jnp.cumsum(sizes)
        rows = jnp.arange(x.shape[0])[:, None]
        parts = [
            jnp.where(
                (rows >= end - n) & (rows < end),
                x @ (w.T if here().out_in else w),
                0.0,
            )
            for w, end, n in zip(weights, ends, sizes, strict=True)
        ]
        return sum(parts)

    def run(x, experts, axes):
        rows = Rows(
            num_seqs=4,
            q_len=8,
            starts=jnp.zeros(4, jnp.int32),
            q_lens=jnp.asarray([8, 8, 3, 0], jnp.int32),
            slots=jnp.zeros(4, jnp.int32),
            mesh_axes=axes,
        )
        parts = [(EXPERT, e, {}) for e in experts]
        return Mixture(spec, router, {}, parts, expert_axes=axes)(x, rows)

    x = jnp.asarray(rng.standard_normal((32, HIDDEN)), jnp.float32)
    wanted = jax.jit(functools.partial(run, axes=()))(x, experts)
    monkeypatch.setattr(grouped, "has_kernels", lambda platform: True)
    monkeypatch.setattr(grouped, "multiply", multiply)
    split = [
        {n: jnp.stack([experts[i][n], experts[2 + i][n]]) for n in experts[0]} for i in range(2)
    ]
    got = jax.jit(jax.vmap(lambda e: run(x, e, ("ep",)), axis_name="ep"))(split)
    assert calls == [2, 2, 2]
    for part in got:
        np.testing.assert_allclose(part[:19], wanted[:19], atol=2e-5)
