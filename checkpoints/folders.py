"""What a path given as a checkpoint or an adapter is instead, and what to do with that."""

from pathlib import Path

from checkpoints.errors import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"


def expect_checkpoint(path: Path) -> None:
    """Checks that a path is a folder that could hold a whole model.

    Raises:
      CheckpointError: it is something else; the message says what, and what to do.
    """
    _expect_folder(path)
    if (path / "config.json").exists():
        return
    if (path / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{path} is an adapter ({ADAPTER_CONFIG}), not a model: add it to its base with "
            f"'jblock convert peft {path} --base BASE --name NAME'"
        )
    if (path / "params.json").exists():
        raise CheckpointError(
            f"{path} has params.json and no config.json: it is in its maker's own layout (Meta's or "
            "Mistral's); take the same model in the layout of transformers"
        )
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        raise CheckpointError(
            f"{path} has no config.json, but a GGUF file: add that with 'jblock convert gguf {gguf[0]}'"
        )
    raise CheckpointError(f"{path} has no config.json: give a complete checkpoint")


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, and not a whole model with an adapter's config left over."""
    whole = (path / "config.json").exists() and any(path.glob("model*.safetensors*"))
    return (path / ADAPTER_CONFIG).is_file() and not whole


def expect_adapter(path: Path) -> None:
    """Checks that a path is a folder that could hold an adapter.

    Raises:
      CheckpointError: it is something else; the message says what, and what to do.
    """
    _expect_folder(path)
    if (path / ADAPTER_CONFIG).exists():
        return
    if (path / "config.json").exists():
        raise CheckpointError(
            f"{path} is a whole model (config.json), not an adapter: add it with "
            f"'jblock convert hf {path} --name NAME'"
        )
    raise CheckpointError(
        f"{path} has no {ADAPTER_CONFIG}: give the folder of an adapter, as PEFT's save_pretrained wrote it"
    )


def _expect_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.exists():
        if path.suffix.lower() == ".gguf":
            raise CheckpointError(
                f"{path} is a GGUF file: add it with 'jblock convert gguf {path}'"
            )
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path} is one weight file: give its folder, {path.parent}, with config.json"
            )
        raise CheckpointError(f"{path} is a file: give the folder of a checkpoint")
    text = str(path)
    raise CheckpointError(
        f"there is no folder {text}: check the path; names on the Hugging Face Hub are org/name[@revision]"
    )
