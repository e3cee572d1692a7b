"""The tokenizer files of a checkpoint: what the zoo keeps, and what it refuses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from checkpoints import tokenizer_identity
from checkpoints.errors import CheckpointError
from checkpoints.source import read_json
from checkpoints.tokenizer_fields import Beside, apply
from jblock.chat.template_files import NAMED_TOKENS

SERVED = "tokenizer.json"
"""What serves; the rest is for chat templates and export, and says which tokens are added."""

FILES = (
    SERVED,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_SAVE = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
# Files of other tokenizers -> what they are, and how tokenizer.json is made from them.
OTHERS = {
    "vocab.json": ("the vocabulary of a byte-level BPE", f"transformers: {_SAVE}"),
    "tekken.json": (
        "the tokenizer of Mistral's own library (mistral-common)",
        "transformers 5: TokenizersBackend.from_pretrained(folder).save_pretrained(folder)",
    ),
    "tokenizer.model.v3": (
        "a SentencePiece model as Mistral's own library names it",
        "take the repository's tokenizer.json, or rename it to tokenizer.model",
    ),
    "tiktoken.model": ("the ranks of tiktoken", f"transformers, with tiktoken installed: {_SAVE}"),
    "spiece.model": ("a SentencePiece model", "rename it to tokenizer.model if it is one of BPE"),
}


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A checkpoint's tokenizer.

    Attributes:
      serving: tokenizer.json in the one form of `tokenizer_identity`: all that decides ids and text.
      kept: what an export needs beside it: the other files byte by byte, and the way back to tokenizer.json.
      files: name -> bytes of the checkpoint's, and of the tokenizer.json that was made here.
      given: names of the files that the checkpoint has, sorted.
      largest_id: the largest id it can give.
      notes: what its user should know.
    """

    serving: bytes
    kept: dict[str, bytes]
    files: Mapping[str, bytes]
    given: tuple[str, ...]
    largest_id: int
    notes: tuple[str, ...]

    @property
    def served(self) -> dict[str, bytes]:
        """The folder that a zoo keeps under "tokenizers"; its id is the tokenizer's."""
        return {SERVED: self.serving, **_for_chats(self.kept)}


def _for_chats(kept: Mapping[str, bytes]) -> dict[str, bytes]:
    """The chat template and what it or the server's chats may name (`jblock.chat.template_files`); {} without
    a template."""
    config = json.loads(kept.get("tokenizer_config.json", b"{}"))
    special = json.loads(kept.get("special_tokens_map.json", b"{}"))
    templates = {n: b for n, b in kept.items() if n.startswith("chat_template.")}
    if not templates and not config.get("chat_template"):
        return {}
    named = {n: config.get(n) or special.get(n) for n in NAMED_TOKENS}
    more = ("chat_template", "extra_special_tokens", "chat_control_tokens", "response_template")
    named |= {n: config.get(n) for n in more}
    named = {n: value for n, value in named.items() if value}
    return templates | {"tokenizer_config.json": json.dumps(named, sort_keys=True).encode()}


def read_tokenizer(path: Path) -> TokenizerFiles | None:
    """The tokenizer in a checkpoint folder; None when there is none.

    Raises:
      CheckpointError: a tokenizer that cannot be served, or a tokenizer.json that does not load.
    """
    files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    beside = Beside(
        **dict(
            zip(
                ("config", "special", "added"),
                (read_json(path / name, required=False) for name in names),
                strict=True,
            )
        )
    )
    if SERVED in files:
        return from_files(files, path, beside)
    if "tokenizer.model" in files:
        from checkpoints import sentencepiece_model

        text = sentencepiece_model.convert(files["tokenizer.model"], beside)
        notes = ["tokenizer.json was made from tokenizer.model"]
        if "add_bos_token" not in beside.config:
            notes.append(
                "tokenizer_config.json does not say add_bos_token: '<s>' is put in front, as for Llama"
            )
        if beside.config.get("legacy", True):
            notes.append(
                "tokenizer_config.json: legacy is not false, so text after an added token gets a space "
                "in front too, as from SentencePiece and transformers 4, and not from transformers 5"
            )
        return from_files(files | {SERVED: text.encode()}, path, beside, notes)
    for name, (what, remedy) in OTHERS.items():
        if (path / name).is_file():
            raise CheckpointError(
                f"{path} has {name}, {what}, but no tokenizer.json: make one ({remedy}), or remove {name} "
                "to serve token ids only"
            )
    return None


def from_files(
    files: Mapping[str, bytes], path: Path, beside: Beside, made: list[str] | None = None
) -> TokenizerFiles:
    """A tokenizer of these files, one of them tokenizer.json.

    Args:
      files: name -> bytes.
      path: where they come from.
      beside: what the files beside tokenizer.json say.
      made: notes, where tokenizer.json was made from another file.

    Raises:
      CheckpointError: tokenizer.json does not load, or what is beside it does not fit it.
    """
    import tokenizers

    raw = files[SERVED]
    try:
        tokenizer = tokenizers.Tokenizer.from_str(raw.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # plain Exception, or PanicException, which is not even that
        raise CheckpointError(f"{path}/tokenizer.json cannot be loaded: {e}") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    before = tokenizer.to_str()
    try:
        notes = apply(tokenizer, beside)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from e
    data = json.loads(raw)
    after = tokenizer.to_str()
    if after != before:
        data["added_tokens"] = json.loads(after)["added_tokens"]
    serving = tokenizer_identity.canonical(data)
    meant = tokenizer_identity.canonical(json.loads(after))
    read = tokenizers.Tokenizer.from_str(serving.decode()).to_str()
    if tokenizer_identity.canonical(json.loads(read)) != meant:
        serving = (
            after.encode()
        )  # what the library makes of it, where the one form does not hold all
    kept = {name: files[name] for name in files if name != SERVED}
    if made is None:
        kept |= tokenizer_identity.form_of(raw, serving)
    return TokenizerFiles(
        serving=serving,
        kept=kept,
        files=files,
        given=tuple(sorted(files.keys() - ({SERVED} if made is not None else set()))),
        largest_id=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1),
        notes=(*(made or ()), *notes),
    )
