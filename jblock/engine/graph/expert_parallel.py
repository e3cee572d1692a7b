"""Experts that lie on devices of their own, as one argument of a program."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import jax


class ExpertGroup:
    """One expert of every part of the mesh. Together their tensors are arrays over all devices, along the
    first dimension, without a copy: each device's part is what the expert has there anyway."""

    def __init__(self, members: Sequence[Any], structs: Mapping[str, jax.ShapeDtypeStruct]):
        """Takes the weights of the experts, part by part, and what describes the joined tensors
        (`params.abstract_params`)."""
        self._members, self._structs = members, structs
        self._joined: dict[str, jax.Array] = {}
        self._watched: list[weakref.ref] = []

    @property
    def size(self) -> int:
        """Bytes on all devices."""
        return sum(member.size for member in self._members)

    @property
    def tensors(self) -> Mapping[str, jax.Array]:
        """Device tensors by name; empty while an expert's are not there."""
        if not self._joined and all(m.tensors for m in self._members):
            joined = {name: self._join(name, struct) for name, struct in self._structs.items()}
            # They share the experts' memory, so they must not outlive them.
            arrays = [a for m in self._members for a in m.tensors.values()]
            self._watched = [weakref.ref(a, lambda _: self._joined.clear()) for a in arrays]
            self._joined = joined
        return self._joined

    def _join(self, name: str, struct: jax.ShapeDtypeStruct) -> jax.Array:
        shards = [s.data for m in self._members for s in m.tensors[name].addressable_shards]
        return jax.make_array_from_single_device_arrays(struct.shape, struct.sharding, shards)
