"""The text model inside a multimodal checkpoint, as the checkpoint that it would be alone.

Its tensors take the names that they have in a text model and the rest of the files is left out, so that a
fine-tune of the text model shares its components, and what an export writes is the text model.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from checkpoints.errors import CheckpointError
from checkpoints.safetensors_file import TensorInfo
from checkpoints.source import Source
from jblock.families.multimodal import Wrapper, text_config, text_name, wrapper_of

_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource(Source):
    """The tensors of a text model. `replaced` holds the small files that are other than the folder's."""

    replaced: Mapping[str, bytes]

    def small_files(
        self, names: tuple[str, ...], tokenizer_files: tuple[str, ...]
    ) -> dict[str, bytes]:
        """What an export of the text model needs; see `Source.small_files`."""
        files = super().small_files(names, tokenizer_files)
        return files | {n: raw for n, raw in self.replaced.items() if n in files}


def text_model(config: dict[str, Any], source: Source) -> tuple[dict[str, Any], Source]:
    """The config and the tensors of the text model; any other checkpoint as it is.

    Raises:
      CheckpointError: two tensors come to the same name.
      ConfigError: as `text_config`.
    """
    wrapper = wrapper_of(config)
    if wrapper is None:
        return config, source
    text = text_config(config, wrapper)
    tensors: dict[str, TensorInfo] = {}
    for name, info in source.tensors.items():
        plain = text_name(name)
        if plain in tensors:
            raise CheckpointError(
                f"{source.path}: {tensors[plain].name!r} and {name!r} would both be {plain!r} in the text "
                "model: save the checkpoint again with one release of transformers"
            )
        if plain is not None:
            tensors[plain] = info
    if "tie_word_embeddings" not in text:
        # What the architectures mean by leaving it out differs between releases; the file says it.
        text["tie_word_embeddings"] = "lm_head.weight" not in tensors
    headers = {
        file: _header(raw) for file, raw in source.headers.items() if _header(raw) is not None
    }
    return text, TextSource(
        path=source.path,
        tensors={n: dataclasses.replace(info, name=n) for n, info in tensors.items()},
        headers={file: raw for file, raw in headers.items() if raw is not None},
        notes=(*source.notes, _note(wrapper, source, tensors)),
        replaced={
            _CONFIG: json.dumps(text, indent=2, sort_keys=True).encode() + b"\n",
            _INDEX: _index(tensors),
        },
    )


def _note(wrapper: Wrapper, source: Source, tensors: Mapping[str, TensorInfo]) -> str:
    total = sum(t.nbytes for t in source.tensors.values())
    left = total - sum(t.nbytes for t in tensors.values())
    return (
        f"the text model of {wrapper.architectures[0]} is added; {len(source.tensors) - len(tensors)} "
        f"tensors of its other parts ({left} of {total} bytes) are left out"
    )


def _header(raw: bytes) -> bytes | None:
    """The header of a file with only the text model's tensors; None: it has none of them."""
    entries = {n: e for n, e in json.loads(raw).items() if n != "__metadata__"}
    out: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        plain = text_name(name)
        if plain is not None:
            begin, end = entry["data_offsets"]
            out[plain] = {**entry, "data_offsets": [at, at + end - begin]}
            at += end - begin
    if len(out) == 1:
        return None
    text = json.dumps(out, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _index(tensors: Mapping[str, TensorInfo]) -> bytes:
    total = sum(t.nbytes for t in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: tensors[n].path.name for n in sorted(tensors)},
    }
    return json.dumps(index, indent=2).encode() + b"\n"
