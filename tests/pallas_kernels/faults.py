"""Off-by-one faults that a kernel's masks could have, and how far each moves the result of a case.

A table of cases is worth something if every such fault is over the tolerance of one of its cases at least.
"""

from collections.abc import Callable, Iterable

import numpy as np

from jblock.pallas_kernels.paged_attention import reference
from tests.pallas_kernels.attention_cases import Case

Visible = Callable[[np.ndarray, np.ndarray, int, int | None, int], np.ndarray]
"""(query positions [n, 1], key positions [1, m], first position, window, page size) -> bool [n, m]."""


def _sees(q: np.ndarray, k: np.ndarray, start: int, window: int | None, page: int) -> np.ndarray:
    del start, page
    return (k <= q) & (k > q - (window or 1 << 30))


def _wider(by: int) -> Visible:
    return lambda q, k, start, window, page: _sees(q, k, start, window and window + by, page)


FAULTS: dict[str, Visible] = {
    "the next token is seen": lambda q, k, start, window, page: (
        _sees(q, k, start, window, page) | ((k == q + 1) & (k > q - (window or 1 << 30)))
    ),
    "a window is one token longer": _wider(1),
    "a window is one token shorter": _wider(-1),
    "the first token is lost": lambda q, k, start, window, page: (
        _sees(q, k, start, window, page) & ((k != 0) | (q == 0))
    ),
    "the last cached token is lost": lambda q, k, start, window, page: (
        _sees(q, k, start, window, page) & ((k != start - 1) | (q < start))
    ),
    "the first token of a page is lost": lambda q, k, start, window, page: (
        _sees(q, k, start, window, page) & ((k != page) | (q == page))
    ),
}


def _attention(case: Case, visible: Visible, seed: int) -> np.ndarray:
    """float32 [rows, heads, d], each sequence's new tokens in turn."""
    rng = np.random.default_rng(seed)
    results = [np.zeros((0, case.heads, case.head_dim), np.float32)]
    for start, new in case.sequences:
        if not new:
            continue
        length = start + new
        q, k, v = (
            rng.standard_normal((heads, length, case.head_dim)).astype(np.float32)
            for heads in (case.heads, case.kv_heads, case.kv_heads)
        )
        k, v = (np.repeat(a, case.heads // case.kv_heads, axis=0) for a in (k, v))
        scale = case.head_dim**-0.5 if case.scale is None else case.scale
        scores = q[:, start:] @ k.swapaxes(1, 2) * np.float32(scale)
        if case.softcap is not None:
            scores = case.softcap * np.tanh(scores / case.softcap)
        positions = np.arange(start, length)[:, None], np.arange(length)[None]
        seen = visible(*positions, start, case.window, case.page_size)
        scores = np.where(seen, scores, -1e30)
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        total = weights.sum(axis=-1, keepdims=True)
        results.append((weights / np.where(total > 0, total, 1) @ v).swapaxes(0, 1))
    return np.concatenate(results)


def caught(fault: Visible, cases: Iterable[Case]) -> list[Case]:
    """The cases whose tolerance a kernel with this fault would exceed."""
    found = []
    for case in cases:
        right, wrong = (_attention(case, visible, 0) for visible in (_sees, fault))
        error = np.abs(right - wrong).max(initial=0.0)
        if error > 2 * case.tolerance * np.abs(right).max(initial=0.0):
            found.append(case)
    return found


def right_is_the_reference(case: Case) -> bool:
    """Whether what is called right here is what the tests hold kernels against."""
    rng = np.random.default_rng(0)
    start, new = case.sequences[0]
    q, k, v = (
        rng.standard_normal((heads, start + new, case.head_dim)).astype(np.float32)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )
    q, k, v = (a.swapaxes(0, 1) for a in (q, k, v))
    wanted = reference.attention(q[start:], k, v, start, case.window, case.softcap, case.scale)
    return np.allclose(_attention(case, _sees, 0)[:new], wanted, atol=1e-5)
