"""Memory that a Pallas TPU kernel names: fields of dataclasses, with shapes beside them."""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def refs(cls: type[T]) -> type[T]:
    """A dataclass that pallas_call takes for a tree of arrays."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))
