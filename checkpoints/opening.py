"""Opening a model by what is there: a folder in Hugging Face form, a GGUF file, or an orbax checkpoint.

`hf`, `gguf`, `orbax`, `plan` and `verify` all open one here, so that they take and refuse the same ones.
"""

from pathlib import Path

from checkpoints.checkpoint import Checkpoint, open_folder
from checkpoints.gguf.file import is_gguf
from checkpoints.gguf.source import open_gguf
from checkpoints.orbax.source import open_orbax
from checkpoints.orbax.tree import is_orbax


def kind_of(path: Path) -> str:
    """What a path holds, by what is in it: "gguf", "orbax", else "hf"."""
    if is_gguf(path):
        return "gguf"
    return "orbax" if is_orbax(path) else "hf"


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads all of a model but its tensors' numbers.

    Raises:
      CheckpointError, ConfigError, SpecError: see `errors.BAD_INPUT`.
    """
    return {"hf": open_folder, "gguf": open_gguf, "orbax": open_orbax}[kind_of(path)](path)
