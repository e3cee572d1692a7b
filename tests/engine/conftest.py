"""The zoo of fixtures, converted once."""

from pathlib import Path

import pytest
from harness import make_zoo


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fixture as a chain, adapters included."""
    return make_zoo(tmp_path_factory.mktemp("fixtures") / "zoo")
