"""A SentencePiece model (`tokenizer.model`) as tokenizer.json, for checkpoints that have only that.

Only what Llama and Mistral were published with is converted: BPE over unnormalized text, a dummy prefix,
spaces written as U+2581. Anything else is refused rather than approximated. The file is a protobuf
(sentencepiece_model.proto); the few fields that matter are read here, so no package is needed.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_fields import Beside, special_texts

_SPACE = "\u2581"
_BPE = 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_REMEDY = "make tokenizer.json with the tool the model came with, and convert again"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One entry of the vocabulary: its text, score (merges go by it) and type."""

    text: str
    score: float
    type: int


def convert(data: bytes, beside: Beside) -> str:
    """The text of tokenizer.json for a SentencePiece model.

    Args:
      data: the file.
      beside: the files beside it, which may have tokens beyond the model's own.

    Raises:
      CheckpointError: no such model, or one that would be tokenized differently.
    """
    config = beside.config
    try:
        pieces = _read(data)
        tokens = _added(pieces, beside)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as e:
        raise CheckpointError(f"tokenizer.model cannot be converted ({e}): {_REMEDY}") from e
    ranks = {piece.text: i for i, piece in enumerate(pieces)}
    unknown = next((p.text for p in pieces if p.type == _UNKNOWN), None)
    if len(ranks) != len(pieces) or unknown is None:
        raise CheckpointError(f"tokenizer.model has no unknown or a repeated piece: {_REMEDY}")
    out = tokenizers.Tokenizer(
        models.BPE(
            vocab=ranks,
            merges=merges_by_score(pieces, ranks),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in ranks,
        )
    )
    # What is one token wherever it stands in the text.
    for id_ in sorted(tokens):
        out.add_tokens([tokens[id_]])
    # A space in front of the text, so that its first word is the piece that it is elsewhere.
    space_first = config.get("add_prefix_space") in (None, True)
    if config.get("legacy", True):
        spaces = [normalizers.Replace(" ", _SPACE)]
        out.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend(_SPACE)] if space_first else []), *spaces]
        )
    else:
        out.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_SPACE, prepend_scheme="first" if space_first else "never", split=False
        )
    out.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1, right=0)] if space_first else []),
        ]
    )
    first = ["<s>"] if config.get("add_bos_token", True) and "<s>" in ranks else []
    last = ["</s>"] if config.get("add_eos_token", False) and "</s>" in ranks else []
    out.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *first, "$B", *last],
        special_tokens=[(token, ranks[token]) for token in first + last],
    )
    return out.to_str(pretty=True)


def _added(pieces: list[Piece], beside: Beside) -> dict[int, AddedToken]:
    """By their ids, the tokens that are one wherever they stand: the model's control pieces, and what
    added_tokens.json and added_tokens_decoder add behind its own. Both may say again what the model says."""
    config, special = beside.config, special_texts(beside)
    if config.get("tokenizer_class", "LlamaTokenizer") not in _CLASSES:
        raise ValueError(f"it is for a {config['tokenizer_class']}")
    first = len(pieces)
    tokens = {
        i: AddedToken(piece.text, normalized=False, special=True)
        for i, piece in enumerate(pieces)
        if piece.type in (_UNKNOWN, _CONTROL)
    }
    for text, id_ in beside.added.items():
        token = AddedToken(str(text), normalized=text not in special, special=text in special)
        tokens.setdefault(_checked(pieces, int(id_), str(text)), token)
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        flags = {f: bool(entry.get(f, False)) for f in _FLAGS}
        text = str(entry["content"])
        tokens[_checked(pieces, int(key), text)] = AddedToken(text, **flags)
    extra = sorted(i for i in tokens if i >= first)
    if extra != list(range(first, first + len(extra))):
        raise ValueError(f"added tokens have the ids {extra}, which do not follow its {first}")
    return tokens


def _checked(pieces: list[Piece], id_: int, text: str) -> int:
    """The id of an added token, where it is not another piece's."""
    if 0 <= id_ < len(pieces) and pieces[id_].text != text:
        raise ValueError(f"added token {text!r} has the id {id_} of its piece {pieces[id_].text!r}")
    return id_


def merges_by_score(pieces: list[Piece], ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first."""
    found = []
    for piece in pieces:
        splits = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
        pairs = [(a, b) for a, b in splits if a in ranks and b in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        found += [(piece.score, a, b) for a, b in pairs]
    found.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=True)
    return [(a, b) for _, a, b in found]


def _read(data: bytes) -> list[Piece]:
    pieces = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            entry = dict(_fields(value))
            (score,) = struct.unpack("<f", entry.get(2, b"\0\0\0\0"))
            pieces.append(Piece(text=entry[1].decode(), score=score, type=entry.get(3, 1)))
        elif field == 2:
            trainer = dict(_fields(value))
        elif field == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no SentencePiece model")
    for what, refused in (
        ("a model type other than BPE", trainer.get(3, 1) != _BPE),
        ("user-defined pieces", any(p.type == _USER_DEFINED for p in pieces)),
        ("spaces as suffixes", trainer.get(24, 0)),
        ("text normalization", normalizer.get(2, b"")),
        ("no dummy prefix", not normalizer.get(3, 1)),
        ("removal of extra spaces", normalizer.get(4, 1)),
        ("unescaped spaces", not normalizer.get(5, 1)),
    ):
        if refused:
            raise ValueError(f"it has {what}")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value of a protobuf message: int, 4 or 8 raw bytes, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("no SentencePiece model")
        if at + length > len(data):
            raise ValueError("the file is truncated")
        yield field, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no SentencePiece model")
