"""What the small files beside a tokenizer.json say of ids and text: applied, named as ignored, or refused.

transformers 5 is followed: it takes tokenizer.json and then adds the tokens that `tokenizer_config.json`,
`special_tokens_map.json` and `added_tokens.json` name.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer

from checkpoints.errors import CheckpointError
from jblock.chat.template_files import NAMED_TOKENS

_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# Read here, by `sentencepiece_model.py` or by `chat.py`.
_READ = frozenset(
    {
        *(*NAMED_TOKENS, *_EXTRA, "added_tokens_decoder", "model_specific_special_tokens"),
        *("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "legacy"),
        *("clean_up_tokenization_spaces", "fix_mistral_regex", "tokenizer_class", "chat_template"),
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    }
)
# Decide nothing of ids and text: where it came from, what is asked of it elsewhere, defaults of batches.
_BOOKKEEPING = frozenset(
    {
        *(
            "backend",
            "is_local",
            "local_files_only",
            "name_or_path",
            "processor_class",
            "_commit_hash",
        ),
        *("model_max_length", "model_input_names", "max_length", "max_len", "stride", "padding"),
        *(
            "padding_side",
            "pad_to_multiple_of",
            "pad_token_type_id",
            "truncation",
            "truncation_side",
        ),
        *(
            "truncation_strategy",
            "tokenizer_file",
            "special_tokens_map_file",
            "transformers_version",
        ),
        *("use_default_system_prompt", "use_fast", "from_slow", "return_token_type_ids", "errors"),
        *(
            "spaces_between_special_tokens",
            "trust_remote_code",
            "verbose",
            "device_map",
            "vocab_size",
        ),
        *(
            "response_schema",
            "sp_model_kwargs",
            "vocab_file",
            "merges_file",
            "revision",
            "token_type",
        ),
    }
)
_SAVE_AGAIN = (
    "save it again with transformers (AutoTokenizer.from_pretrained(folder).save_pretrained(folder)) and "
    "check what is saved, or take the field out"
)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The files beside a tokenizer.json, each {} when there is none: `config` is tokenizer_config.json,
    `special` special_tokens_map.json, `added` added_tokens.json (text -> id)."""

    config: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, Any] = field(default_factory=dict)
    added: Mapping[str, Any] = field(default_factory=dict)


def apply(tokenizer: Tokenizer, beside: Beside) -> tuple[str, ...]:
    """Adds to a tokenizer the tokens that only the files beside it have.

    Returns:
      Notes: what was added, and fields that are ignored though they say something else.

    Raises:
      CheckpointError: a field that would give other ids than the tokenizer does, or is malformed.
    """
    try:
        _refuse(tokenizer, beside.config)
        return (*_add(tokenizer, beside), *_ignored(tokenizer, beside.config))
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"the files beside tokenizer.json cannot be read ({e}): save the tokenizer again"
        ) from e


def special_texts(beside: Beside) -> frozenset[str]:
    """The tokens that the files name as special."""
    config = dict(beside.config)
    if config.get("added_tokens_decoder") is None:
        config |= beside.special
    tokens = (*(_token(config.get(k)) for k in NAMED_TOKENS), *map(_token, _extra(config)))
    return frozenset(t.content for t in tokens if t is not None)


def prepends_space(tokenizer: Tokenizer) -> bool | None:
    """Whether a tokenizer puts a space in front of a text; None: text is no pieces with spaces to it."""
    if tokenizer.pre_tokenizer is None and tokenizer.normalizer is None:
        return None
    text = "x" if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str("x")
    if tokenizer.pre_tokenizer is not None:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
        text = "".join(piece for piece, _ in pieces)
    return text.startswith(
        ("\u2581", "\u0120")
    )  # as SentencePiece and as byte-level BPE write a space


def _refuse(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    if config.get("split_special_tokens"):
        raise CheckpointError(
            "tokenizer_config.json: split_special_tokens is true, so that special tokens in a text are taken "
            "apart, which is not served: set it to false, or remove the tokenizer files to serve ids only"
        )
    if config.get("fix_mistral_regex"):
        raise CheckpointError(
            "tokenizer_config.json: fix_mistral_regex is true, so that transformers splits texts otherwise "
            f"than tokenizer.json says: {_SAVE_AGAIN}"
        )
    said, found = _prefixes(tokenizer, config)
    if said is not found and not _follows_its_file(tokenizer, config):
        raise CheckpointError(
            f"tokenizer_config.json: add_prefix_space is {said!r}, and tokenizer.json puts "
            f"{'a' if found else 'no'} space in front of a text; transformers follows the former for a "
            f"{config['tokenizer_class']}: {_SAVE_AGAIN}"
        )


def _prefixes(tokenizer: Tokenizer, config: Mapping[str, Any]) -> tuple[bool | None, bool | None]:
    """Whether a space comes in front of a text, by the config and by the tokenizer; equal where either does
    not say."""
    said, found = config.get("add_prefix_space"), prepends_space(tokenizer)
    return (None, None) if said is None or found is None else (bool(said), found)


def _follows_its_file(tokenizer: Tokenizer, config: Mapping[str, Any]) -> bool:
    """Whether transformers 5 takes tokenizer.json whatever add_prefix_space says: it makes the tokenizers of
    other classes anew."""
    name = str(config.get("tokenizer_class") or "PreTrainedTokenizerFast").removesuffix("Fast")
    bytes_ = "ByteLevel" in str(tokenizer.pre_tokenizer) + str(tokenizer.decoder)
    return name in ("PreTrainedTokenizer", "TokenizersBackend") or (
        name == "LlamaTokenizer" and bytes_
    )


def _add(tokenizer: Tokenizer, beside: Beside) -> list[str]:
    """Adds what tokenizer.json lacks, as `from_pretrained` of transformers 5 does."""
    config = dict(beside.config)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:  # as transformers 4 and earlier saved: the other files count only then
        config |= beside.special
    named = {k: v for k in NAMED_TOKENS if (v := _token(config.get(k)))} | dict(_own_names(config))
    extra = [_token(t) for t in _extra(config)]
    if decoder is not None:
        stated = {int(id_): _token(entry) for id_, entry in decoder.items()}
    else:
        special = special_texts(beside)
        known = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        stated = {
            int(id_): AddedToken(text, normalized=text not in special, special=text in special)
            for text, id_ in beside.added.items()
            if text not in known
        }
    by_text = {t.content: t for t in stated.values() if t is not None}
    tokens = [stated[id_] for id_ in sorted(stated)]
    there = {t.content for t in tokenizer.get_added_tokens_decoder().values()} | by_text.keys()
    for token in (*named.values(), *extra):
        if token is not None and token.content not in there:
            tokens.append(token)
            there.add(token.content)
    before = {id_: _state(t) for id_, t in tokenizer.get_added_tokens_decoder().items()}
    names = {t.content for t in named.values()}
    for token in tokens:
        if token is not None:
            token.special = token.special or token.content in names
    tokenizer.add_tokens([t for t in tokens if t is not None])
    _check_ids(tokenizer, stated)
    after = {id_: _state(t) for id_, t in tokenizer.get_added_tokens_decoder().items()}
    return _told(before, after)


def _check_ids(tokenizer: Tokenizer, stated: Mapping[int, AddedToken | None]) -> None:
    for id_, token in sorted(stated.items()):
        given = None if token is None else tokenizer.token_to_id(token.content)
        if token is not None and given != id_:
            raise CheckpointError(
                f"added token {token.content!r} has the id {id_} in the files beside tokenizer.json, and "
                f"{given} by tokenizer.json: one of them is of another tokenizer; save it again"
            )


def _told(before: Mapping[int, Any], after: Mapping[int, Any]) -> list[str]:
    new = [after[i]["content"] for i in sorted(after.keys() - before.keys())]
    changed = [after[i]["content"] for i in sorted(before) if after.get(i) != before[i]]
    notes = []
    if new:
        notes.append(
            f"{len(new)} tokens that stand only beside tokenizer.json are added to it: {_list(new)}"
        )
    if changed:
        notes.append(
            f"flags of {len(changed)} added tokens are taken from tokenizer_config.json: {_list(changed)}"
        )
    return notes


def _ignored(tokenizer: Tokenizer, config: Mapping[str, Any]) -> Iterator[str]:
    """What tokenizer_config.json says and tokenizer.json does not do."""
    around = tokenizer.encode("", add_special_tokens=True).ids
    for which in ("bos", "eos"):
        said, token = config.get(f"add_{which}_token"), _token(config.get(f"{which}_token"))
        if said is None or token is None:
            continue
        done = tokenizer.token_to_id(token.content) in around
        if bool(said) is not done:
            yield (
                f"tokenizer_config.json: add_{which}_token is {said!r}, tokenizer.json "
                f"{'adds' if done else 'does not add'} {token.content!r}: tokenizer.json is followed, as "
                "transformers 5 does"
            )
    prefix, found = _prefixes(tokenizer, config)
    if prefix is not found:
        yield (
            f"tokenizer_config.json: add_prefix_space is {prefix!r}, tokenizer.json puts "
            f"{'a' if found else 'no'} space in front of a text: tokenizer.json is followed, as "
            "transformers 5 does"
        )
    bpe = type(tokenizer.model).__name__ == "BPE"
    cleans = config.get("clean_up_tokenization_spaces") and not bpe
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if cleans or config.get(forced):
        yield (
            "tokenizer_config.json: clean_up_tokenization_spaces is ignored: text comes out with the spaces "
            "that tokenizer.json's decoder writes"
        )
    unread = [
        k
        for k, v in sorted(config.items())
        if v not in (None, False) and k not in _READ | _BOOKKEEPING and not _is_own_name(k, v)
    ]
    if unread:
        yield (
            f"tokenizer_config.json: {len(unread)} fields are ignored, tokenizer.json decides: "
            + ", ".join(unread)
        )


def _extra(config: Mapping[str, Any]) -> Sequence[Any]:
    """Further special tokens, under the newer of the two names if both are there."""
    found: Any = next((config[k] for k in _EXTRA if config.get(k)), [])
    if not isinstance(found, list | Mapping):
        raise ValueError(f"special tokens are {found!r}, no list")
    return list(found.values()) if isinstance(found, Mapping) else found


def _own_names(config: Mapping[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    """Special tokens under names of the model's own, such as image_token."""
    own = config.get("model_specific_special_tokens")
    for name, value in {**config, **(own if isinstance(own, Mapping) else {})}.items():
        token = _token(value) if _is_own_name(name, value) else None
        if token is not None:
            yield name, token


def _is_own_name(name: str, value: Any) -> bool:
    return name.endswith("_token") and name not in _READ and isinstance(value, str)


def _token(value: Any) -> AddedToken | None:
    """A token as JSON has it: its text, or an object with flags."""
    if isinstance(value, Mapping):
        flags = {f: bool(value[f]) for f in _FLAGS if f in value}
        return AddedToken(str(value["content"]), **flags) if value.get("content") else None
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a token is {value!r}")
    return AddedToken(value, special=True) if value else None


def _state(token: AddedToken) -> dict[str, Any]:
    return {f: getattr(token, f) for f in ("content", *_FLAGS)}


def _list(texts: Sequence[str]) -> str:
    return ", ".join(map(repr, texts[:4])) + (", ..." if len(texts) > 4 else "")
