"""Rows in and out of a device's registers."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jblock.engine.programs import needed, row_moves
from jblock.engine.runner.runner import Runner


def take(device: Runner, width: int, rows: Sequence[int]) -> jax.Array:
    """Enqueues copying rows out of the registers of a width; float32 [n, width], n at least as many."""
    size = row_moves.size_for(len(rows))
    program = device.executables.get(needed.moving_key("take_rows", width, size))
    return program(device.state.registers[width], _ids(device, rows, size))


def put(device: Runner, width: int, rows: Sequence[int], values: Any) -> None:
    """Enqueues writing what `take` gave elsewhere into registers; row `num_rows` stands for none."""
    size = row_moves.size_for(len(rows))
    program = device.executables.get(needed.moving_key("put_rows", width, size))
    registers = device.state.registers
    registers[width] = program(registers[width], values, _ids(device, rows, size))


def _ids(device: Runner, rows: Sequence[int], size: int) -> Any:
    ids = np.full(size, device.num_rows, np.int32)
    ids[: len(rows)] = rows
    return device.state.put(ids)
