"""What two models share and how far apart the rest is."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

_ROWS = 1 << 20  # elements compared at a time, so that float32 copies stay small


def diff(
    zoo: Zoo, a: Chain, b: Chain, on_bytes: Callable[[int], None] = lambda nbytes: None
) -> dict[str, Any]:
    """Compares the components and deltas of two chains of a zoo, step by step.

    Returns:
      `{"a", "b", "steps": [...], "totals": {...}}`. Each step has its indices in both chains (None where
      one has no counterpart), `kind`, `state` ("equal", "changed", "other" for another spec, "only a",
      "only b"), the bytes of its components (`a_bytes`, `b_bytes`) and of its deltas (`a_delta_bytes`,
      `b_delta_bytes`), whether the deltas are the same (`same_deltas`), and for changed ones
      `max_difference` (the largest absolute difference of two elements) and `tensor`, which has it.

    Raises:
      ZooError: something of them is missing or damaged.
    """
    rows = []
    for i, j in _pairs(zoo, a, b):
        left = a.steps[i] if i is not None else None
        right = b.steps[j] if j is not None else None
        row: dict[str, Any] = {"a": i, "b": j}
        for key, step in (("a", left), ("b", right)):
            record = zoo.component(step.component) if step else None
            if record:
                row["kind"] = record.spec.kind
            row[f"{key}_bytes"] = record.nbytes if record else 0
            row[f"{key}_delta_bytes"] = sum(zoo.delta(d).nbytes for d in step.deltas) if step else 0
        if left is None or right is None:
            row["state"] = "only a" if left else "only b"
        elif left.component == right.component:
            row["state"] = "equal"
        elif zoo.component(left.component).spec != zoo.component(right.component).spec:
            row["state"] = "other"
        else:
            one, other = zoo.load_component(left.component), zoo.load_component(right.component)
            tensor, most = _largest(one, other)
            row |= {"state": "changed", "tensor": tensor, "max_difference": most}
        row["same_deltas"] = bool(left and right and left.deltas == right.deltas)
        on_bytes(row["a_bytes"] + row["b_bytes"])
        rows.append(row)
    shared = [r for r in rows if r["state"] == "equal"]
    return {
        "a": f"{a.name}@{a.version}",
        "b": f"{b.name}@{b.version}",
        "steps": rows,
        "totals": {
            "equal": len(shared),
            "changed": sum(r["state"] == "changed" for r in rows),
            "other": sum(r["state"] not in ("equal", "changed") for r in rows),
            "equal_bytes": sum(r["a_bytes"] for r in shared),
            "a_bytes": sum(r["a_bytes"] + r["a_delta_bytes"] for r in rows),
            "b_bytes": sum(r["b_bytes"] + r["b_delta_bytes"] for r in rows),
        },
    }


def _pairs(zoo: Zoo, a: Chain, b: Chain) -> list[tuple[int | None, int | None]]:
    """Which step stands against which: one by one if the chains are as long, else by what is equal."""
    if len(a.steps) == len(b.steps):
        return [(i, i) for i in range(len(a.steps))]
    one, other = ([s.component for s in chain.steps] for chain in (a, b))
    pairs: list[tuple[int | None, int | None]] = []
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    for _, i0, i1, j0, j1 in matcher.get_opcodes():
        both = min(i1 - i0, j1 - j0)
        pairs += [(i0 + k, j0 + k) for k in range(both)]
        pairs += [(i, None) for i in range(i0 + both, i1)]
        pairs += [(None, j) for j in range(j0 + both, j1)]
    return pairs


def _largest(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> tuple[str, float | None]:
    """The tensor with the largest difference, and the difference; None if it is one of dtypes only."""
    best: tuple[str, float | None] = ("", None)
    for name, value in one.items():
        a, b = value.reshape(-1), other[name].reshape(-1)
        most = 0.0
        for at in range(0, a.size, _ROWS):
            # float64: halves of the largest float32 may be apart by more than it holds.
            x, y = (v[at : at + _ROWS].astype(np.float32).astype(np.float64) for v in (a, b))
            most = max(most, float(np.abs(x - y).max()))
        if best[1] is None or most > best[1]:
            best = (name, most)
    return best
