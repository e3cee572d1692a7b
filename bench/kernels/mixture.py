"""A mixture of experts as the engine computes it, and in other ways: the feed-forwards of some layers, 8
experts of which a row takes 2, one layer after another, which is more than the caches hold."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.kernels import Case
from bench.models import MODEL_250M, TINY
from jblock.blocks.linear import matmul
from jblock.blocks.moe import Mixture, group_size
from jblock.blocks.platform import here
from jblock.blocks.rows import Rows
from jblock.blocks.spec import ExpertSpec, RouterSpec
from jblock.pallas_kernels.grouped_block_matmul.api import grouped_block_matmul

GRIDS = ((1, 1), (8, 1), (32, 1), (1, 256))
EXPERTS, TOP_K, LAYERS = 8, 2, 4
Layer = tuple[dict[str, jax.Array], Sequence[dict[str, jax.Array]]]
Form = Callable[[RouterSpec, ExpertSpec, Layer, jax.Array, Rows], jax.Array]


def backend() -> str:
    """The mixture is made of matmuls; see `projection` for what serves those."""
    return "xla"


def cases(quick: bool) -> list[Case]:
    """Batches of decoding and a chunk of prefill by each form."""
    forms: dict[str, Form] = {
        "as served": _served,
        "grouped_block_matmul": _grouped,
        "every expert on every row": _all,
    }
    grids, dtypes = (GRIDS, ("float32", "bfloat16")) if not quick else (GRIDS[:1], ("float32",))
    return [
        _case(name, form, dtype, grid, quick)
        for dtype in dtypes
        for grid in grids
        for name, form in forms.items()
    ]


def tunes(case: Case) -> list[Any]:
    """None of them has block sizes."""
    return []


def _served(
    spec: RouterSpec, expert: ExpertSpec, layer: Layer, x: jax.Array, rows: Rows
) -> jax.Array:
    router, experts = layer
    return Mixture(spec, router, {}, [(expert, e, {}) for e in experts])(x, rows)


def _routed(layer: Layer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and numbers of each row's experts, [T, TOP_K] both."""
    return jax.lax.top_k(jax.nn.softmax(matmul(x, layer[0]["router.weight"], here())), TOP_K)


def _grouped(
    spec: RouterSpec, expert: ExpertSpec, layer: Layer, x: jax.Array, rows: Rows
) -> jax.Array:
    """Picks sorted by expert through one grouped matmul a projection."""
    weights, chosen = _routed(layer, x)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS).astype(jnp.int32)

    def project(x: jax.Array, name: str) -> jax.Array:
        own = [e[f"{name}.weight"] for e in layer[1]]
        own = own if here().out_in else [w.T for w in own]
        return grouped_block_matmul(x, own, sizes)

    row = order // TOP_K
    picked = x[row]
    inner = jax.nn.silu(project(picked, "gate")) * project(picked, "up")
    return x.at[row].add(project(inner, "down") * weights.reshape(-1)[order][:, None])


def _all(spec: RouterSpec, expert: ExpertSpec, layer: Layer, x: jax.Array, rows: Rows) -> jax.Array:
    """Every expert multiplies every row, by 0 where the row did not pick it."""
    weights, chosen = _routed(layer, x)
    out = x
    for i, e in enumerate(layer[1]):
        share = jnp.sum(jnp.where(chosen == i, weights, 0.0), axis=1, keepdims=True)
        gate = matmul(x, e["gate.weight"], here())
        inner = jax.nn.silu(gate) * matmul(x, e["up.weight"], here())
        out = out + share * matmul(inner, e["down.weight"], here())
    return out


def _case(name: str, form: Form, dtype: str, grid: tuple[int, int], quick: bool) -> Case:
    shape = TINY if quick else MODEL_250M
    width = shape.intermediate_size // 2
    router = RouterSpec(
        hidden_size=shape.hidden_size, num_experts=EXPERTS, top_k=TOP_K, norm_eps=1e-5
    )
    expert = ExpertSpec(hidden_size=shape.hidden_size, intermediate_size=width)
    count = 3 * LAYERS * shape.hidden_size * width
    num_rows = grid[0] * grid[1]
    # Experts that are picked at all, on average.
    read = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** num_rows)
    return Case(
        name=f"{num_rows} rows, {dtype}, {name}",
        moved=int(count * read) * jnp.dtype(dtype).itemsize,
        flops=2 * num_rows * TOP_K * count,
        make=functools.partial(_make, form, dtype, grid, router, expert),
        shape=group_size(num_rows, router),
    )


def _make(
    form: Form, dtype: str, grid: tuple[int, int], router: RouterSpec, expert: ExpertSpec
) -> tuple[list[Any], Any]:
    keys = iter(jax.random.split(jax.random.key(0), 2 * LAYERS + 1))

    def draw(spec: RouterSpec | ExpertSpec) -> dict[str, jax.Array]:
        out = {}
        for name, shape in spec.tensors().items():
            laid = shape if here().out_in or len(shape) == 1 else shape[::-1]
            if isinstance(spec, ExpertSpec):  # whose numbers decide nothing
                out[name] = jnp.full(laid, 1e-3, dtype)
            else:
                out[name] = jax.random.normal(next(keys), laid, jnp.float32)
        return out

    layers = [(draw(router), [draw(expert) for _ in range(EXPERTS)]) for _ in range(LAYERS)]
    num_seqs, q_len = grid
    ones = jnp.ones(num_seqs, jnp.int32)
    rows = Rows(
        num_seqs=num_seqs, q_len=q_len, starts=0 * ones, q_lens=q_len * ones, slots=0 * ones
    )

    def call(x: jax.Array, layers: Any, rows: Rows, blocks: Any = None) -> jax.Array:
        for layer in layers:
            x = form(router, expert, layer, x, rows)
        return x

    x = jax.random.normal(next(keys), (num_seqs * q_len, router.hidden_size), jnp.float32)
    return [x, layers, rows], call
