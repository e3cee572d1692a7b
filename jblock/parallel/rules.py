"""Sharding rules: which mesh axes each logical axis of an array is split over.

A mesh has three axes. `tp` splits the inside of every block (heads, columns of an ffn and of every expert,
vocabulary) as Megatron does (arXiv 1909.08053). `ep` does so too, but for the experts of a mixture: each part
of it holds some of them whole (arXiv 2006.16668). `dp` gives each group of devices sequences, registers and
KV pages of its own.
`pp` is written with them and no axis of a mesh: agents with a mesh each, over which chains are cut.
This file is plain data: it knows neither jax nor blocks.
"""

import dataclasses
import functools
import math
import re

MESH_AXES = ("dp", "ep", "tp")
_AXES = ("dp", "pp", "ep", "tp")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; the default is one device.

    Attributes:
      dp: groups of devices with sequences of their own.
      pp: agents, each with a span of every chain.
      ep: parts of every block, and of the experts of a mixture, whole experts each.
      tp: parts of every block, each expert included.
    """

    dp: int = 1
    ep: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self):
        for axis in _AXES:
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh axis {axis} is {getattr(self, axis)}; give at least 1")

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.dp * self.pp * self.ep * self.tp

    @classmethod
    def parse(cls, text: str) -> "MeshShape":
        """A shape from text such as "tp=4" or "dp=2,tp=4"; "" is one device.

        Raises:
          ValueError: text of another form, an axis that is none or comes twice, or a count below 1.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            match = re.fullmatch(rf"\s*({'|'.join(_AXES)})=(\d+)\s*", part, re.ASCII)
            if not match or match[1] in sizes:
                raise ValueError(
                    f"mesh {text!r}: {part!r} is not understood; give each of "
                    f"{', '.join(_AXES)} at most once, such as tp=4 or ep=2,tp=2"
                )
            sizes[match[1]] = int(match[2])
        return cls(**sizes)

    def __str__(self) -> str:
        parts = [f"{a}={getattr(self, a)}" for a in _AXES if getattr(self, a) > 1]
        return ",".join(parts) or "tp=1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Logical axes to mesh axes, for one mesh. Part of every signature: it decides programs.

    Attributes:
      mesh: devices along each mesh axis.
      rows: sequences of a batch, register rows, KV pages and sequence slots.
      heads: query heads, and KV heads with them.
      mlp: inner columns of an ffn, or of an expert that every row passes.
      experts: experts of a mixture.
      expert_mlp: inner columns of one of these.
      vocab: rows of the embedding and unembedding tables.
    """

    mesh: MeshShape = MeshShape()
    rows: tuple[str, ...] = ("dp",)
    heads: tuple[str, ...] = ("ep", "tp")
    mlp: tuple[str, ...] = ("ep", "tp")
    experts: tuple[str, ...] = ("ep",)
    expert_mlp: tuple[str, ...] = ("tp",)
    vocab: tuple[str, ...] = ("ep", "tp")

    def __post_init__(self):
        for name in self.logical_axes():
            axes = getattr(self, name)
            if not set(axes) <= set(MESH_AXES) or len(set(axes)) != len(axes):
                raise ValueError(
                    f"sharding rule {name} is {axes}; give mesh axes of {MESH_AXES}, none twice"
                )

    @classmethod
    def logical_axes(cls) -> tuple[str, ...]:
        """Names of the axes there are rules for."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "mesh")

    def axes(self, logical: str | None) -> tuple[str, ...]:
        """The mesh axes of more than one device that an axis is split over; None is split over none.

        Raises:
          ValueError: no rule has this name.
        """
        if logical is None:
            return ()
        if logical not in self.logical_axes():
            raise ValueError(
                f"no sharding rule for the axis {logical!r}; there are {self.logical_axes()}"
            )
        return tuple(a for a in getattr(self, logical) if getattr(self.mesh, a) > 1)

    def ways(self, logical: str | None) -> int:
        """Parts an axis is split into."""
        return math.prod(getattr(self.mesh, a) for a in self.axes(logical))

    @functools.cached_property
    def single(self) -> bool:
        """Whether there is one device only."""
        return self.mesh.size == 1

    def spec(self, *logical: str | None) -> tuple[tuple[str, ...] | None, ...]:
        """The mesh axes each axis of one array is split over, as jax's PartitionSpec takes them.

        Raises:
          ValueError: two of its axes would be split over the same mesh axis.
        """
        used: dict[str, str | None] = {}
        for name in logical:
            for axis in self.axes(name):
                if axis in used:
                    raise ValueError(
                        f"axes {used[axis]!r} and {name!r} of one array are both split over the "
                        f"mesh axis {axis!r}: give them different ones in ShardingRules"
                    )
                used[axis] = name
        return tuple(self.axes(name) or None for name in logical)

    def __str__(self) -> str:
        changed = [
            f"{f.name}={'+'.join(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if f.name != "mesh" and getattr(self, f.name) != f.default
        ]
        return ",".join([str(self.mesh), *changed])


ONE_DEVICE = ShardingRules()
