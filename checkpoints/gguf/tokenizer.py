"""The tokenizer files that the metadata of a GGUF file stands for: tokenizer.json and what goes with it.

A file has the vocabulary and, by name, the rule by which text is split before merging; the rules are those
the models were published with, under the names llama.cpp gives them (src/llama-vocab.cpp). A name that is
not known is refused: another rule gives other ids for the same text.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.errors import CheckpointError
from checkpoints.sentencepiece_model import Piece, merges_by_score

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # types of tokens
_SPACE = "\u2581"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class _Split:
    """How byte-level text is split: by `pattern` (None: GPT-2's own), `digits` one by one before that; words
    of the vocabulary are whole (`whole_words`), a bos comes first (`bos`), text is normalized (`nfc`)."""

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2, _DIGITS = _Split(), _Split(digits=True)
_OF_LLAMA3 = _Split(pattern=_LLAMA3, whole_words=True, bos=True)
_OF_QWEN2 = _Split(pattern=_QWEN2, nfc=True)
_SPLITS = {
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "llama3": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "llama-bpe": _OF_LLAMA3,
    "falcon3": _OF_LLAMA3,
    "qwen2": _OF_QWEN2,
    "deepseek-r1-qwen": _Split(pattern=_QWEN2, bos=True),
    "tekken": _Split(pattern=_TEKKEN, whole_words=True, bos=True),
}
# A turn of a chat ends with one of these; files name only one token that ends a generation.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """`files` of the tokenizer by name, ids that end a generation, and the id that begins a text."""

    files: dict[str, bytes]
    eos: tuple[int, ...]
    bos: int | None


def tokenizer(metadata: Mapping[str, Any], architecture: str, path: object) -> GgufTokenizer | None:
    """The tokenizer of a file; None where it has none.

    Raises:
      CheckpointError: a kind or a rule that is not known, or a vocabulary that is malformed.
    """
    model = metadata.get(f"{_KEY}model")
    if model is None or model == "none":
        return None
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{path}: {_KEY}model is {model!r}; served: 'gpt2' and 'llama': take the model as safetensors "
            "and use 'jblock convert hf'"
        )
    try:
        tokens = _tokens(metadata)
        if model == "gpt2":
            made, bos_first = _byte_level(metadata, tokens, path)
        else:
            made, bos_first = _sentencepiece(metadata, tokens, architecture)
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library's PanicException is not even an Exception
        raise CheckpointError(f"{path}: its tokenizer cannot be made: {e}") from e
    for i, (text, kind) in enumerate(tokens):
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED):
            special = kind != _USER_DEFINED
            made.add_tokens([AddedToken(text, normalized=False, special=special)])
            if made.token_to_id(text) != i:
                raise CheckpointError(f"{path}: token {i} ({text!r}) is in the vocabulary twice")
    bos, eos = _id(metadata, "bos", tokens, path), _id(metadata, "eos", tokens, path)
    first = [bos] if metadata.get(f"{_KEY}add_bos_token", bos_first) and bos is not None else []
    last = [eos] if metadata.get(f"{_KEY}add_eos_token", False) and eos is not None else []
    if first or last:
        before, behind = ([tokens[i][0] for i in ids] for ids in (first, last))
        made.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            pair=[*before, "$A", *behind, *before, "$B", *behind],
            special_tokens=[(tokens[i][0], i) for i in {*first, *last}],
        )
    files = {"tokenizer.json": made.to_str(pretty=True).encode()}
    files |= _settings(metadata, tokens, bool(first), bool(last), path)
    ends = {t: i for i, (t, kind) in enumerate(tokens) if t in _ENDS and kind == _CONTROL}
    others = [_id(metadata, name, tokens, path) for name in ("eot", "eom")]
    found = dict.fromkeys(i for i in (eos, *others, *ends.values()) if i is not None)
    return GgufTokenizer(files=files, eos=tuple(found), bos=bos)


def _tokens(metadata: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Text and type of every token, by id."""
    texts = metadata[f"{_KEY}tokens"]
    kinds = metadata.get(f"{_KEY}token_type") or [1] * len(texts)
    if not all(isinstance(t, str) for t in texts) or len(kinds) != len(texts):
        raise ValueError("tokens and their types do not belong together")
    return list(zip(texts, kinds, strict=True))


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[tuple[str, int]], path: object
) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE over bytes, and whether a bos comes first where the file does not say."""
    name = metadata.get(f"{_KEY}pre", "default")
    split = _SPLITS.get(name)
    if split is None:
        raise CheckpointError(
            f"{path}: {_KEY}pre is {name!r}, a way to split text that is not known; known: "
            f"{', '.join(_SPLITS)}: take the model as safetensors and use 'jblock convert hf'"
        )
    merges = [tuple(merge.split(" ")) for merge in metadata[f"{_KEY}merges"]]
    vocab = {text: i for i, (text, kind) in enumerate(tokens) if kind != _UNUSED}
    made = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words)
    )
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    if split.nfc:
        made.normalizer = normalizers.NFC()
    return made, split.bos


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[tuple[str, int]], architecture: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE as SentencePiece has it, with merges that follow from the scores."""
    gemma = architecture.startswith("gemma")
    scores = metadata[f"{_KEY}scores"]
    if len(scores) != len(tokens):
        raise ValueError("tokens and their scores do not belong together")
    if gemma:
        # Its runs of spaces are written as such, and it merges in the order of its vocabulary.
        tokens[:] = [(_spaces(text), kind) for text, kind in tokens]
        scores = [-i for i in range(len(tokens))]
    pieces = [
        Piece(text=text, score=score, type=kind)
        for (text, kind), score in zip(tokens, scores, strict=True)
    ]
    ranks = {text: i for i, (text, kind) in enumerate(tokens) if kind != _UNUSED}
    unknown = next((text for text, kind in tokens if kind == _UNKNOWN), None)
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=ranks,
            merges=merges_by_score([p for p in pieces if p.type != _UNUSED], ranks),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback="<0x00>" in ranks,
        )
    )
    prefix = metadata.get(f"{_KEY}add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    made.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1, right=0)] if prefix else []),
        ]
    )
    return made, True


def _spaces(text: str) -> str:
    return _SPACE * len(text) if len(text) > 1 and not text.strip(" ") else text


def _id(
    metadata: Mapping[str, Any], name: str, tokens: list[tuple[str, int]], path: object
) -> int | None:
    value = metadata.get(f"{_KEY}{name}_token_id")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < len(tokens):
        raise CheckpointError(
            f"{path}: {_KEY}{name}_token_id is {value!r}; ids go from 0 to {len(tokens) - 1}"
        )
    return value


def _settings(
    metadata: Mapping[str, Any],
    tokens: list[tuple[str, int]],
    add_bos: bool,
    add_eos: bool,
    path: object,
) -> dict[str, bytes]:
    """tokenizer_config.json and the chat template."""
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config |= {"clean_up_tokenization_spaces": False}
    for key, name in named.items():
        id_ = _id(metadata, key, tokens, path)
        if id_ is not None:
            config[f"{name}_token"] = tokens[id_][0]
    files = {}
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
        config["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode()
    return files
