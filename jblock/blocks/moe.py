"""A mixture of experts with its residual: every row goes through the experts its router picks.

Exact: no row is dropped, whatever the load. Rows are sorted by expert and cut into groups of a static
size, so an expert runs one program over as many groups as its rows fill, and none if it has none: a
decoded token reads the weights of its own experts only. A row's arithmetic depends on its own values
and the size of a group, which the shape of the batch decides, never on the rows beside it.

Where there are kernels, all experts' rows go through each projection in one call instead, unless experts
have deltas or weights of few bits.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jblock.blocks import grouped
from jblock.blocks.activation import ACTIVATIONS
from jblock.blocks.linear import Linear
from jblock.blocks.norm import Norm
from jblock.blocks.rows import Rows
from jblock.blocks.slots import Slots
from jblock.blocks.spec import ExpertSpec, RouterSpec

Tensors = Mapping[str, jax.Array]
_SMALLEST_GROUP = 8
_WIDE_GROUP = 64


def group_size(num_rows: int, spec: RouterSpec) -> int:
    """Rows an expert takes at once, a power of two: twice its even share, so that most have one group, up to
    64, beyond which the empty rows of a group cost more than another group: there its share. At least 8,
    below which a matmul of more rows costs next to nothing; all rows where they are fewer."""
    share = 1 << (-(-num_rows * spec.top_k // spec.num_experts) - 1).bit_length()
    return min(num_rows, max(_SMALLEST_GROUP, min(2 * share, _WIDE_GROUP), share))


class Expert(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, spec: ExpertSpec, params: Tensors, deltas: Tensors):
        """Builds the expert over tensors named as in ExpertSpec, laid as in Linear."""
        self.spec = spec
        self.gate = Linear(params, deltas, "gate")
        self.up = Linear(params, deltas, "up")
        self.down = Linear(params, deltas, "down")

    @jax.named_scope("expert")
    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[T, hidden_size] float32 -> the same."""
        activation = ACTIVATIONS[self.spec.activation]
        return self.down(activation(self.gate(x, rows)) * self.up(x, rows), rows)

    @property
    def plain(self) -> bool:
        """Whether it is three matrices and nothing else."""
        return all(p.plain for p in (self.gate, self.up, self.down))


class Mixture(nnx.Module):
    """A router and the experts behind it. See RouterSpec."""

    def __init__(
        self,
        spec: RouterSpec,
        params: Tensors,
        deltas: Tensors,
        experts: Sequence[tuple[ExpertSpec, Tensors, Tensors]],
        expert_axes: tuple[str, ...] = (),
    ):
        """Builds the block over the router's tensors and its experts' specs, tensors and tables.

        Args:
          spec: of the router.
          params: its tensors.
          deltas: its tables.
          experts: all of them; split over mesh axes those that each device has, a run as long on each, and
            the shared one.
          expert_axes: mesh axes the experts are split over.

        Raises:
          ValueError: another number of experts than the router sends rows to.
        """
        if not expert_axes and len(experts) != spec.followers:
            raise ValueError(f"a router of {spec.followers} experts is followed by {len(experts)}")
        self.spec, self.expert_axes = spec, expert_axes
        self.norm = Norm("rms", params, "norm.", spec.norm_eps, Slots(deltas))
        self.router = Linear(params, deltas, "router")
        self.shared_gate = Linear(params, deltas, "shared_gate") if spec.shared else None
        self.experts = nnx.List([Expert(*e) for e in experts])

    def __call__(self, x: jax.Array, rows: Rows) -> jax.Array:
        """[T, hidden_size] float32 -> the same."""
        spec, num_rows = self.spec, x.shape[0]
        normed = self.norm(x, rows)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.router(normed, rows)), spec.top_k)
        if spec.normalize:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        # Padding goes to no expert, or it would be waited for.
        chosen = jnp.where(rows.valid.reshape(-1, 1), chosen, spec.num_experts).reshape(-1)

        # The k-th pick of row t is number t * top_k + k; picks of one expert lie together in `order`.
        size = group_size(num_rows, spec)
        order = jnp.concatenate([jnp.argsort(chosen, stable=True), jnp.zeros(size, jnp.int32)])
        counts = jnp.sum(chosen[:, None] == jnp.arange(spec.num_experts), axis=0, dtype=jnp.int32)
        starts = jnp.cumsum(counts) - counts
        weights, slots = weights.reshape(-1), jnp.repeat(rows.slots, rows.q_len)

        out = jnp.zeros_like(x)
        here = len(self.experts) - spec.shared
        first = jax.lax.axis_index(self.expert_axes) * here if self.expert_axes else 0
        plain = all(e.plain for e in list(self.experts)[:here])
        together = plain and grouped.has_kernels(rows.platform)
        if together:
            picks, own = order[: chosen.size], counts
            if self.expert_axes:  # this device's experts first
                picks = jnp.roll(picks, -starts[first])
                own = jax.lax.dynamic_slice(counts, (first,), (here,))
            row = picks // spec.top_k
            y = self._together(normed[row], own, rows)
            # Picks of no expert come last, and are padding's, or other devices'.
            row = jnp.where(jnp.arange(row.size) < own.sum(), row, num_rows)
            out = out.at[row].add(y * weights[picks][:, None], mode="drop")
        for number, expert in enumerate(self.experts):
            e = first + number
            if number == here:
                gate = jax.nn.sigmoid(self.shared_gate(normed, rows)) if self.shared_gate else 1.0
                # The groups' rows know no mesh, so that nothing is summed twice.
                alone = dataclasses.replace(rows, mesh_axes=())
                return x + self._whole(out + gate * expert(normed, alone), rows)
            if together:
                continue

            def add(group: jax.Array, out: jax.Array, e=e, expert=expert) -> jax.Array:
                nth = group * size + jnp.arange(size, dtype=jnp.int32)
                real = nth < counts[e]
                picks = jax.lax.dynamic_slice(order, (starts[e] + group * size,), (size,))
                row = jnp.where(real, picks // spec.top_k, num_rows)
                group_rows = Rows(
                    num_seqs=size,
                    q_len=1,
                    starts=jnp.zeros(size, jnp.int32),
                    q_lens=real.astype(jnp.int32),
                    slots=jnp.where(real, slots.at[row].get(mode="clip"), 0),
                    platform=rows.platform,
                )
                # Tied to the loop: of a single row there is but one group, and XLA would see that no product
                # depends on which, and make them all before the loops, for experts without rows too.
                taken, _ = jax.lax.optimization_barrier((normed.at[row].get(mode="clip"), group))
                y = expert(taken, group_rows)
                return out.at[row].add(y * weights[picks][:, None], mode="drop")

            out = jax.lax.fori_loop(0, (counts[e] + size - 1) // size, add, out)
        return x + self._whole(out, rows)

    def _together(self, x: jax.Array, counts: jax.Array, rows: Rows) -> jax.Array:
        """Rows sorted by expert [T, hidden_size], how many each expert has -> the same through them."""
        experts = list(self.experts)[: counts.size]

        def project(x: jax.Array, name: str) -> jax.Array:
            weights = [getattr(e, name).weight[...] for e in experts]
            return grouped.multiply(x, weights, counts, rows.platform)

        activation = ACTIVATIONS[experts[0].spec.activation]
        return project(activation(project(x, "gate")) * project(x, "up"), "down")

    @staticmethod
    def _whole(out: jax.Array, rows: Rows) -> jax.Array:
        """The sum over the devices, each of which has a part of every expert's columns."""
        return jax.lax.psum(out, rows.mesh_axes) if rows.mesh_axes else out
