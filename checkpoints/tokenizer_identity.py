"""One form for all files that say the same tokenizer, and the way back to each.

Libraries write one tokenizer in several ways: merges as "a b" or as ["a", "b"], fields that were added with
their defaults, settings of batches. A zoo keeps the form below, so that a model and its fine-tune have the
same tokenizer whichever release saved them; how a file was written is kept in a few kilobytes.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jblock.zoo import codec

FORM = "tokenizer.json.form"
"""Of a folder of kept files: tokenizer.json as it was, without vocabulary and merges."""
DEFLATED = "tokenizer.json.z"
"""Of a folder of kept files: tokenizer.json as it was, deflated; where FORM does not lead back to it."""

_MOST = 1 << 30  # bytes of a tokenizer.json
# What a part of a tokenizer means that an earlier release wrote without some fields.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "BPE": {
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    },
    "Unigram": {"unk_id": None, "byte_fallback": False},
    "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "Metaspace": {"prepend_scheme": "always", "split": True},
    "Split": {"invert": False},
}


def canonical(data: Mapping[str, Any]) -> bytes:
    """The one form of a tokenizer, given what its tokenizer.json holds: JSON that the library reads, with the
    same bytes for all that tokenize and decode alike but for how they were written."""
    out = {k: _plain(v) for k, v in sorted(data.items()) if k not in ("padding", "truncation")}
    out |= {"padding": None, "truncation": None}
    model = out.get("model")
    if isinstance(model, dict):
        if isinstance(model.get("vocab"), dict):
            vocab = data["model"]["vocab"]
            model["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
        if isinstance(model.get("merges"), list):
            model["merges"] = [_pair(m) for m in model["merges"]]
    added = out.get("added_tokens")
    if isinstance(added, list):
        out["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return json.dumps(out, ensure_ascii=False, separators=(",", ":")).encode()


def form_of(raw: bytes, serving: bytes) -> dict[str, bytes]:
    """What leads from the one form back to a file: FORM or DEFLATED, for a folder of kept files; nothing
    where the two are the same."""
    if raw == serving:
        return {}
    data = json.loads(raw)
    model = data.get("model")
    form: dict[str, Any] = {"data": data, "merges": None, "indent": 2}
    if isinstance(model, dict):
        merges = model.get("merges")
        form["merges"] = "strings" if merges and isinstance(merges[0], str) else "pairs"
        form["data"] = {
            **data,
            "model": {**model, "vocab": 0, "merges": 0} if merges is not None else model,
        }
        for indent in (2, None):
            kept = json.dumps(form | {"indent": indent}, ensure_ascii=False).encode()
            try:
                if _restored(kept, serving) == raw:
                    return {FORM: kept}
            except (AttributeError, KeyError, TypeError, ValueError):
                break
    return {DEFLATED: zlib.compress(raw, 9)}


def file_of(kept: Mapping[str, bytes], serving: bytes) -> bytes:
    """A tokenizer.json as it was, given what `form_of` gave and the one form.

    Raises:
      ValueError: these do not lead to one.
    """
    if FORM in kept:
        try:
            return _restored(kept[FORM], serving)
        except (AttributeError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{FORM} does not fit its tokenizer: {e}") from e
    if DEFLATED in kept:
        inflater = zlib.decompressobj()
        try:
            data = inflater.decompress(kept[DEFLATED], _MOST)
        except zlib.error as e:
            raise ValueError(f"{DEFLATED} cannot be inflated: {e}") from e
        if not inflater.eof:
            raise ValueError(f"{DEFLATED} is cut off, or has over {_MOST} bytes inflated")
        return data
    return serving


def _restored(kept: bytes, serving: bytes) -> bytes:
    form = codec.parse_json(kept, FORM)
    model = json.loads(serving)["model"]
    if form["indent"] not in (None, 2):
        raise ValueError(f"indent {form['indent']!r}")
    pretty, data = form["indent"] == 2, form["data"]
    if not isinstance(data.get("model"), dict) or "vocab" not in data["model"]:
        raise ValueError("no vocabulary")
    text = json.dumps(
        data,
        ensure_ascii=False,
        indent=form["indent"],
        separators=None if pretty else (",", ":"),
    )
    quote = _quoter()
    space = ": " if pretty else ":"
    vocab = (f"{quote(t)}{space}{i}" for t, i in model["vocab"].items())
    merges: Iterable[str]
    if form["merges"] == "strings":
        merges = (quote(f"{a} {b}") for a, b in model["merges"])
    elif pretty:
        merges = (
            f"[\n        {quote(a)},\n        {quote(b)}\n      ]" for a, b in model["merges"]
        )
    else:
        merges = (f"[{quote(a)},{quote(b)}]" for a, b in model["merges"])
    for name, items, ends in (("vocab", vocab, "{}"), ("merges", merges, "[]")):
        hole = f'"{name}"{space}0'
        if text.count(hole) != 1:
            raise ValueError(f"{name} has no place")
        text = text.replace(hole, f'"{name}"{space}{_joined(items, ends, pretty)}')
    return text.encode()


def _joined(items: Iterable[str], ends: str, pretty: bool) -> str:
    """The items of an object or list in the model of a tokenizer.json."""
    lines = list(items)
    if not pretty or not lines:
        return ends[0] + ",".join(lines) + ends[1]
    return ends[0] + "\n      " + ",\n      ".join(lines) + "\n    " + ends[1]


def _quoter() -> Callable[[str], str]:
    return json.JSONEncoder(ensure_ascii=False).encode


def _plain(value: Any) -> Any:
    """Tables with sorted fields and the defaults that they were written without."""
    if isinstance(value, list):
        # Vocabularies and merges are long lists of short ones.
        return value if value and isinstance(value[0], str | list) else [_plain(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    kind = value.get("type")
    fields = {**_DEFAULTS.get(str(kind), {}), **value}
    if kind == "Metaspace":
        fields.pop("str_rep", None)
        prefix = fields.pop("add_prefix_space", True)
        if "prepend_scheme" not in value:
            fields["prepend_scheme"] = "always" if prefix else "never"
    if kind == "BPE":
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            fields[name] = fields[name] or None
    vocab = fields.pop("vocab", None)
    out = {k: _plain(fields[k]) for k in sorted(fields)}
    return out if vocab is None else out | {"vocab": vocab}


def _pair(merge: Any) -> list[str]:
    """A merge, which old files write in one text; no piece has a space there."""
    return merge.split(" ") if isinstance(merge, str) else merge
