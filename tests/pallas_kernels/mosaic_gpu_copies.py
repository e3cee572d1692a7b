"""Copies of jax's Mosaic GPU interpreter: their bytes counted, and stores that add, which it lacks.

`_Memory` knows the interpreter's inner functions of jax 0.12, `_Memory10` those of jax 0.10.
"""

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

_ADDING = threading.Lock()


def count_copies(count: Callable[[str, int], None]) -> None:
    """Has count("read", bytes) called for what a copy brings into shared memory, count("written", bytes) for
    what it takes out, and has stores add that are to add."""
    memory = _Memory10 if hasattr(gpu_callbacks, "DeviceLocalMemoryTransfer") else _Memory
    memory.count_reads(lambda nbytes: count("read", nbytes))
    store = gpu_callbacks.copy_smem_to_gmem

    def store_and_count(*, reduction_op: str | None, **kwargs: Any) -> Any:
        source, destination = (memory(side, kwargs) for side in ("src", "dst"))
        value = source.load()
        count("written", value.nbytes)
        if reduction_op is None:
            return store(reduction_op=None, **kwargs)
        if reduction_op != "add":
            raise NotImplementedError(reduction_op)
        with _ADDING:
            destination.store(destination.load() + value)
        return kwargs["token"]

    gpu_callbacks.copy_smem_to_gmem = store_and_count


class _Memory:
    """One side, "src" or "dst", of a store from shared memory, in jax 0.12."""

    def __init__(self, side: str, kwargs: Any):
        self.memory = gpu_callbacks._get_shared_memory()
        self.key = gpu_callbacks.HostAllocationKey.from_array(
            kwargs[f"{side}_allocation_key_as_array"]
        )
        transforms = gpu_callbacks._remove_noop_transforms(kwargs[f"{side}_transforms"])
        self.transforms = jax.tree.map(int, transforms)
        self.kwargs = kwargs

    @staticmethod
    def count_reads(count: Callable[[int], None]) -> None:
        """Has it called with the bytes of each copy into shared memory."""
        task = gpu_callbacks.AsyncCopyGmemToSmemTask
        execute = task.__call__

        def execute_and_count(self: Any, tma_thread_id: int) -> None:
            execute(self, tma_thread_id)
            whole = gpu_callbacks._get_shared_memory().buffer_shape_and_dtype(
                self.src_allocation_key
            )
            count(int(np.prod(self.src_access.shape)) * np.dtype(whole.dtype).itemsize)

        task.__call__ = execute_and_count

    def load(self) -> np.ndarray:
        """What lies there."""
        access = self.memory.access(self.key, self.transforms)
        return self.memory.get_buffer_content(self.key, access, self.kwargs["thread"])[0]

    def store(self, value: np.ndarray) -> None:
        """Puts it there."""
        access = self.memory.access(self.key, self.transforms)
        self.memory.store_buffer_content(self.key, access, value, self.kwargs["thread"])


class _Memory10(_Memory):
    """The same in jax 0.10."""

    @staticmethod
    def count_reads(count: Callable[[int], None]) -> None:
        """As of `_Memory`."""
        transfer = gpu_callbacks.DeviceLocalMemoryTransfer
        execute = transfer.execute

        def execute_and_count(self: Any, token: Any) -> Any:
            token = execute(self, token)
            count(self.data.nbytes)
            return token

        transfer.execute = execute_and_count

    def load(self) -> np.ndarray:
        """What lies there."""
        who = {k: self.kwargs[k] for k in ("token", "device_id", "grid_point_coords", "thread_id")}
        key = self.key.as_jax_array
        _, value = gpu_callbacks._get(
            **who, allocation_key_as_array=key, transforms=self.transforms
        )
        return value

    def store(self, value: np.ndarray) -> None:
        """Puts it there."""
        place = gpu_callbacks.interpret_utils.to_range(self.transforms)
        device, thread = (int(self.kwargs[k]) for k in ("device_id", "thread_id"))
        thread = self.memory.get_global_thread_id(device, thread)
        self.memory.store_buffer_content(self.key, place, value, thread)
