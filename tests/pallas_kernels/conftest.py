"""Keeps a process that interprets hundreds of kernels within what Linux allows it."""

import pytest

from tests.pallas_kernels import tpu_interpreter


@pytest.fixture(autouse=True)
def few_mappings():
    """A test finds room for its programs."""
    yield
    tpu_interpreter.bound_mappings()
