"""Where arrays live: sharding rules on real devices."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jblock.blocks.platform import Platform, here
from jblock.parallel.rules import MESH_AXES, ONE_DEVICE, ShardingRules


@dataclasses.dataclass(frozen=True)
class Placement:
    """Sharding rules with the devices they are for.

    Attributes:
      rules: logical axes to mesh axes.
      devices: as many as the mesh has; none means jax's default device.
      abstract: arrays are only described, because the devices are not here or nothing is to run on them.
    """

    rules: ShardingRules = ONE_DEVICE
    devices: tuple[jax.Device, ...] = ()
    abstract: bool = False

    @classmethod
    def on(
        cls,
        rules: ShardingRules,
        devices: Sequence[jax.Device] | None = None,
        *,
        abstract: bool = False,
    ) -> "Placement":
        """The rules on the first of `devices`, by default those of this process.

        Raises:
          ValueError: there are too few devices.
        """
        if devices is None and rules.single:
            return cls()
        devices = jax.local_devices() if devices is None else devices
        size = rules.mesh.size
        if len(devices) < size:
            raise ValueError(
                f"mesh {rules.mesh} needs {size} devices and there are {len(devices)}: give a "
                "smaller mesh (on CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N)"
            )
        return cls(rules, tuple(devices[:size]), abstract)

    @property
    def platform(self) -> Platform:
        """What its programs are compiled for."""
        return Platform.of(self.devices[0]) if self.devices else here()

    @property
    def mesh(self) -> Mesh:
        """The jax mesh."""
        shape = self.rules.mesh
        grid = np.array(self.devices, object).reshape(shape.dp, shape.ep, shape.tp)
        return Mesh(grid, MESH_AXES)

    def expert_part(self, part: int) -> "Placement":
        """The devices of one part of the experts, as a mesh without `ep`."""
        shape = self.rules.mesh
        rules = dataclasses.replace(self.rules, mesh=dataclasses.replace(shape, ep=1))
        if not self.devices:
            return Placement(rules)
        grid = np.array(self.devices, object).reshape(shape.dp, shape.ep, shape.tp)
        return Placement(rules, tuple(grid[:, part].reshape(-1)), self.abstract)

    def stacked(self, shape: Sequence[int], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        """One array of every part of the experts, along the first dimension.

        Args:
          shape: of one part's array.
          dtype: of both.
          axes: the logical axis of each dimension in `expert_part`'s mesh.
        """
        first, *rest = ("expert_mlp" if a == "mlp" else a for a in axes)
        # Columns that are stacked are split over both mesh axes, as an ffn's are.
        first = "experts" if first is None else "mlp"
        size = shape[0] * self.rules.ways("experts")
        return self.struct((size, *shape[1:]), dtype, first, *rest)

    def sharding(self, *axes: str | None) -> Sharding | None:
        """The sharding of an array with these logical axes; None on the default device."""
        if not self.devices:
            return None
        if self.rules.single:
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, self.spec(*axes))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes."""
        return PartitionSpec(*self.rules.spec(*axes))

    def struct(self, shape: Sequence[int], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        """An abstract array: its global shape, and the logical axis of each leading dimension."""
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self.sharding(*axes))

    def put(self, array: np.ndarray, *axes: str | None) -> Any:
        """An array on the devices: a jax.Array, or what describes it if abstract."""
        if self.abstract:
            return self.struct(array.shape, array.dtype, *axes)
        return jax.device_put(array, self.sharding(*axes))

    def zeros(self, struct: jax.ShapeDtypeStruct) -> Any:
        """Zeros of the form that `struct` gave; the struct itself if abstract."""
        if self.abstract:
            return struct
        return jax.numpy.zeros(struct.shape, struct.dtype, device=struct.sharding)

    def full(self, struct: jax.ShapeDtypeStruct, value: float) -> Any:
        """An array of one value of the form that `struct` gave; the struct itself if abstract."""
        if self.abstract:
            return struct
        return jax.numpy.full(struct.shape, value, struct.dtype, device=struct.sharding)

    def lower(
        self,
        function: Callable[..., Any],
        donate: tuple[int, ...],
        arguments: Sequence[Any],
        outputs: Any,
    ) -> jax.stages.Lowered:
        """Lowers a program for these devices, each of which runs `function` on its own part.

        Args:
          function: over the arrays of one device.
          donate: numbers of the arguments whose memory it may take.
          arguments: trees of what `struct` gave.
          outputs: tree prefix of the results' PartitionSpecs.
        """
        if not self.rules.single:
            inputs = jax.tree.map(lambda a: a.sharding.spec, tuple(arguments))
            mapped = jax.shard_map(
                function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False
            )
            mapped.__name__ = mapped.__qualname__ = function.__name__
            function = mapped
        program = jax.jit(function, donate_argnums=donate)
        if not self.devices:
            return program.lower(*arguments)
        # Pallas asks the mesh which chip it lowers for, and the default device where there is none.
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return program.lower(*arguments)


SINGLE = Placement()
