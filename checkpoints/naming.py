"""Which prefix of tensor names was found and which was expected: what a mismatch of names comes from."""

from collections.abc import Collection, Sequence

# Part of a name -> where it comes from, and how to save without it.
_WRAPPERS = {
    "_orig_mod": "torch.compile wraps a model so: save model._orig_mod",
    "module": "data parallel training wraps a model so: save model.module",
    "_fsdp_wrapped_module": "FSDP wraps a model so: gather the full state dict and save that",
    "_forward_module": "an accelerator's wrapper is saved along: save the unwrapped model",
    "_checkpoint_wrapped_module": "activation checkpointing wraps layers so: save the unwrapped model",
    "language_model": "the text model of a multimodal wrapper is named so",
    "base_layer": "the base layers of an adapter are named so: call merge_and_unload() and save the result",
    "base_model": "PEFT wraps a model so, here once too often: call merge_and_unload() and save the "
    "result, or save the adapter with save_pretrained",
}
_ADAPTER_NAME = (
    "a part that is an adapter's own name: save it with save_pretrained, which leaves that out"
)
_SAMPLES, _CHECKED = 4, 64


def explain(found: Collection[str], wanted: Collection[str]) -> str:
    """Says how the names that were found differ from those that were expected.

    Args:
      found: names of tensors that nothing expects.
      wanted: names that are missing.

    Returns:
      A sentence with one name of each, the prefix (or inner part) that was found and the one that was
      expected, and where it comes from; "" where no one difference explains half of the names.
    """
    there = set(found)
    ordered = sorted(wanted)
    checked = ordered[:: len(ordered) // _CHECKED + 1]
    matches: dict[_Change, int] = {}
    for name in ordered[:: len(ordered) // _SAMPLES + 1]:
        for change in _changes(name, there):
            if change not in matches:
                matches[change] = sum(_apply(change, n) in there for n in checked)
    if not matches:
        return ""
    # Of equal ones the shortest, and one that is counted from the start.
    best = max(matches, key=lambda c: (matches[c], -len(c[2]) - len(c[3]), not c[1]))
    if matches[best] * 2 < min(len(checked), len(there)):
        return ""
    name = next(n for n in checked if _apply(best, n) in there)
    seen = _apply(best, name)
    return f"the tensors are called {seen!r}, expected {name!r}: {_told(name, seen)}"


def _told(wanted: str, found: str) -> str:
    a, b = wanted.split("."), found.split(".")
    before = _common(a, b)
    behind = _common(a[before:][::-1], b[before:][::-1])
    gone, come = a[before : len(a) - behind], b[before : len(b) - behind]

    def prefix(parts: list[str]) -> str:
        front = "".join(f"{p}." for p in parts[: len(parts) - behind])
        return repr(front) if front else "no prefix"

    told = f"{prefix(b)} was found where {prefix(a)} is expected"
    if len(come) == 1 and before and b[before - 1].startswith("lora_"):
        return f"{told} ({_ADAPTER_NAME})"
    known = [_WRAPPERS[part] for part in come if part in _WRAPPERS]
    if not known and "base_model" in gone:
        known = ["PEFT's save_pretrained writes it: save the adapter so"]
    return f"{told} ({known[0]})" if known else told


_Change = tuple[int, bool, tuple[str, ...], tuple[str, ...]]
"""Where (parts from the start, or from the end), which parts are expected, and which are there."""


def _changes(wanted: str, found: set[str]) -> list[_Change]:
    """How `wanted` could have become one of the names that end, or begin, like it."""
    parts = wanted.split(".")
    changes = []
    for name in found:
        other = name.split(".")
        if other[-1] != parts[-1] or not _same_numbers(parts, other):
            continue
        before = _common(parts, other)
        behind = _common(parts[before:][::-1], other[before:][::-1])
        gone = tuple(parts[before : len(parts) - behind])
        come = tuple(other[before : len(other) - behind])
        if len(gone) + len(come) <= 6:
            changes.append((before, False, gone, come))
            changes.append((behind, True, gone, come))
    return changes


def _apply(change: _Change, name: str) -> str:
    at, from_end, gone, come = change
    parts = name.split(".")
    begin = len(parts) - at - len(gone) if from_end else at
    if begin < 0 or tuple(parts[begin : begin + len(gone)]) != gone:
        return ""
    return ".".join((*parts[:begin], *come, *parts[begin + len(gone) :]))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _same_numbers(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether both name the same layers and experts."""
    return [p for p in one if p.isdigit()] == [p for p in other if p.isdigit()]
