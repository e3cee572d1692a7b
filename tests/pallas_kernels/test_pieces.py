"""Ranges are cut into pieces that cover them once."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jblock.pallas_kernels.pieces import piece_bound, pieces

PIECES = jax.jit(pieces, static_argnums=(2, 3))


@settings(max_examples=100, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(0, 50), st.integers(-3, 40)), min_size=5, max_size=5),
    size=st.sampled_from([1, 4, 16]),
)
def test_pieces_cover_every_range_once(ranges, size):
    begin = np.array([b for b, _ in ranges], np.int32)
    end = np.array([b + n for b, n in ranges], np.int32)
    wanted = [
        (s, i)
        for s, (b, n) in enumerate(ranges)
        if n > 0
        for i in range(b // size, (b + n - 1) // size + 1)
    ]
    lengths = np.maximum(end - begin, 0)
    assert len(wanted) <= piece_bound(5, int(lengths.max()), int(lengths.sum()), size)
    seq, number, count = (np.asarray(a) for a in PIECES(begin, end, size, 200))
    got = list(zip(seq.tolist(), number.tolist(), strict=True))
    assert got[: int(count)] == wanted
    assert all(0 <= s < 5 for s, _ in got)
