"""What the converter's tests share."""

from pathlib import Path

import pytest
from converter_cli import Cli


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture) -> Cli:
    """The converter on a zoo that does not exist yet."""
    return Cli(tmp_path / "zoo", capsys)
