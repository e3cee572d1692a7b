"""Keeps a process that interprets hundreds of kernels within what Linux allows it."""

import gc
from pathlib import Path

import jax
import pytest

# Of 65,530 that Linux allows by default; the compilation that needs one more ends the process.
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True)
def few_mappings():
    """Drops compiled programs when there are many: an interpreted kernel takes hundreds of mappings."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
