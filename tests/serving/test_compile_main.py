"""`jblock-compile`: what it refuses, and what it says."""

from pathlib import Path

import pytest
from forked import run_each

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.parallel import targets

FIXTURE = Path(__file__).parent.parent / "fixtures" / "hf" / "llama_gqa_untied"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """One tiny model."""
    path = tmp_path_factory.mktemp("compile") / "zoo"
    hf.convert(FIXTURE, path, "tiny", Progress(False))
    return path


REFUSED = [
    (("--target=tpu:v7:2x2",), "give tpu:v5e:2x2"),
    (("--target=cpu", "--executable_cache={zoo}/programs"), "lies in the zoo"),
    (("--target=cpu", "--mesh=tp=2"), "needs 2 devices"),
    (("--target=cpu", "--models=nobody"), "nobody"),
    (("--target=cpu", "--dtyp=float32"), "Unknown command line flag"),
]


@pytest.fixture(scope="module")
def refused(zoo, tmp_path_factory):
    """The exit code and the words of each."""
    folder = tmp_path_factory.mktemp("refused")
    given = (f"--zoo={zoo}", f"--executable_cache={folder / 'programs'}")
    lines = [[*given, *(word.format(zoo=zoo) for word in words)] for words, _ in REFUSED]
    return run_each("serving.compile_main", lines, folder, "jax", "jblock.parallel.targets")


@pytest.mark.parametrize("at", range(len(REFUSED)), ids=lambda at: REFUSED[at][0][-1])
def test_refuses_with_a_remedy(refused, at):
    code, words = refused[at]
    assert code == 2 and "Traceback" not in words
    assert REFUSED[at][1] in words


def test_says_which_compiler_is_missing(monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda package: False)
    with pytest.raises(ValueError, match=r"libtpu.*jblock\[compile\]"):
        targets.Target.parse("tpu:v5e:2x2").devices()
