"""State of interrupted training: what another could have written, or is damaged, is not gone on with."""

import os

import numpy as np
import pytest

from jblock.adapt import training_state
from jblock.user_cache import private_folder
from jblock.zoo.records import ZooError

WORK = "a" * 64
ARRAYS = [np.ones((2, 3), np.float32), np.zeros((4,), np.float32)]
SHAPES = [(2, 3), (4,)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def file():
    return private_folder("training") / f"{WORK}.npz"


def test_what_was_written_is_read_and_then_removed():
    training_state.write(WORK, 7, ARRAYS)
    done, arrays = training_state.read(WORK, SHAPES)
    assert done == 7
    assert all(np.array_equal(a, b) for a, b in zip(arrays, ARRAYS, strict=True))
    training_state.remove(WORK)
    assert training_state.read(WORK, SHAPES) is None


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_state_is_none(keep):
    training_state.write(WORK, 7, ARRAYS)
    data = file().read_bytes()
    file().write_bytes(data[: int(len(data) * keep)])
    assert training_state.read(WORK, SHAPES) is None


@pytest.mark.parametrize("at", range(0, 700, 23))
def test_a_flipped_byte_never_raises(at):
    training_state.write(WORK, 7, ARRAYS)
    data = bytearray(file().read_bytes())
    data[at % len(data)] ^= 0xFF
    file().write_bytes(bytes(data))
    training_state.read(WORK, SHAPES)


@pytest.mark.parametrize(
    "arrays",
    [
        [ARRAYS[0]],
        [ARRAYS[1], ARRAYS[0]],
        [np.full((2, 3), np.nan, np.float32), ARRAYS[1]],
        [np.ones((2, 3), np.int32), ARRAYS[1]],
    ],
    ids=["too few", "other shapes", "not finite", "other dtype"],
)
def test_a_state_of_something_else_is_none(arrays):
    training_state.write(WORK, 7, arrays)
    assert training_state.read(WORK, SHAPES) is None


def test_a_folder_that_others_may_write_to_is_refused():
    os.chmod(private_folder("training"), 0o777)
    with pytest.raises(ZooError, match="others"):
        training_state.read(WORK, SHAPES)
