"""Programs compile for accelerators that are not here. Needs the extra `compile`, and fails without."""

import os
import subprocess
import sys

import pytest


@pytest.mark.long
def test_a_spread_of_the_compile_matrix():
    done = subprocess.run(
        [sys.executable, "-m", "jblock.compile_check", "--quick"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
