"""`jblock-compile`: what it refuses, and what it says."""

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.parallel import targets

ROOT = Path(__file__).parent.parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "hf" / "llama_gqa_untied"


def compile_main(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the command."""
    command = [sys.executable, "-m", "serving.compile_main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """One tiny model."""
    path = tmp_path_factory.mktemp("compile") / "zoo"
    hf.convert(FIXTURE, path, "tiny", Progress(False))
    return path


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--target=tpu:v7:2x2",), "give tpu:v5e:2x2"),
        (("--target=cpu", "--executable_cache={zoo}/programs"), "lies in the zoo"),
        (("--target=cpu", "--mesh=tp=2"), "needs 2 devices"),
        (("--target=cpu", "--models=nobody"), "nobody"),
        (("--target=cpu", "--dtyp=float32"), "Unknown command line flag"),
    ],
)
def test_refuses_with_a_remedy(zoo, tmp_path, arguments, words):
    folder = f"--executable_cache={tmp_path / 'programs'}"
    given = [a.format(zoo=zoo) for a in arguments]
    done = compile_main(f"--zoo={zoo}", folder, *given)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert words in done.stderr


def test_says_which_compiler_is_missing(monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda package: False)
    with pytest.raises(ValueError, match=r"libtpu.*jblock\[compile\]"):
        targets.Target.parse("tpu:v5e:2x2").devices()
