"""Which thread of a warpgroup holds which element, by the layouts that `hopper.py` asks jax for, executed as
index maps and held against the fragments that NVIDIA documents (PTX ISA, "Register Fragments and Shared
Memory Matrix Layouts" of wgmma.mma_async, and stmatrix).

The interpreter has no layouts, so nothing else here would notice one that changed its meaning.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jblock.pallas_kernels import hopper

SHAPE = (64, 64)


def elements(layout) -> np.ndarray:
    """[warp, lane, register] -> (row, column) of an array of SHAPE, as [4, 32, registers, 2]."""
    layout = layout.to_mgpu()
    tiled = np.arange(np.prod(SHAPE)).reshape(SHAPE)
    for tile in layout.tiling.tiles:
        rank = len(tile)
        before, last = tiled.shape[:-rank], tiled.shape[-rank:]
        split = [n for whole, part in zip(last, tile, strict=True) for n in (whole // part, part)]
        tiled = tiled.reshape(*before, *split)
        start = len(before)
        outer = [start + 2 * i for i in range(rank)]
        inner = [start + 2 * i + 1 for i in range(rank)]
        tiled = tiled.transpose(*range(start), *outer, *inner)
    count = tiled.ndim
    warps = [d % count for d in layout.warp_dims]
    lanes = [d % count for d in layout.lane_dims]
    vector = layout.vector_dim % count
    registers = [d for d in range(count) if d not in (*warps, *lanes, vector)]
    tiled = tiled.transpose(*warps, *lanes, *registers, vector).reshape(4, 32, -1)
    return np.stack(np.divmod(tiled, SHAPE[1]), axis=-1)


def documented(row, column) -> np.ndarray:
    """The same from formulas of the warp, the lane and the register."""
    warp, lane, register = np.indices((4, 32, SHAPE[0] * SHAPE[1] // 128))
    return np.stack([row(warp, lane, register), column(warp, lane, register)], axis=-1)


def packed(values: int) -> np.ndarray:
    """Elements of fewer bits: a lane has `values` that follow each other in a row, one register in memory."""
    return documented(
        lambda w, t, r: 16 * w + t // 4 + 8 * (r // values % 2),
        lambda w, t, r: 4 * values * (r // (2 * values)) + values * (t % 4) + r % values,
    )


LAYOUTS = {
    # The accumulator, and a left operand of 16 bits: pairs of columns, four lanes a row.
    plgpu.Layout.WGMMA: packed(2),
    # 4 bits, eight of a row in one register: what `hopper.load_widened` reads of int4 at a time.
    plgpu.Layout.WGMMA_UPCAST_4X: packed(8),
    # 8 bits, four of a row in one register, lanes 1 and 2 of a row swapped: so one exchange between two lanes
    # makes an operand of 16 bits of them.
    plgpu.Layout.WGMMA_UPCAST_2X: documented(
        lambda w, t, r: 16 * w + t // 4 + 8 * (r // 4 % 2),
        lambda w, t, r: 16 * (r // 8) + 8 * (t % 2) + 4 * (t % 4 // 2) + r % 4,
    ),
    # The accumulator with each square of 2 x 2 turned: a lane has two rows of one column.
    plgpu.Layout.WGMMA_TRANSPOSED: documented(
        lambda w, t, r: 16 * w + 8 * (r // 2 % 2) + 2 * (t // 8) + r % 2,
        lambda w, t, r: 8 * (r // 4) + 2 * (t % 4) + t // 4 % 2,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_threads_hold_what_the_instruction_says(layout):
    np.testing.assert_array_equal(elements(layout), LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_has_one_register(layout):
    flat = elements(layout).reshape(-1, 2)
    assert len({tuple(e) for e in flat.tolist()}) == SHAPE[0] * SHAPE[1]


@pytest.fixture
def asked(monkeypatch):
    """Lets `hopper` run on plain arrays, and lists the layouts that it asks for."""
    calls = []

    def load(ref, *_, layout, optimized):
        calls.append(("load", layout))
        return ref

    def layout_cast(value, layout):
        calls.append((str(value.dtype), layout))
        return value

    monkeypatch.setattr(hopper.plgpu, "load", load)
    monkeypatch.setattr(hopper.plgpu, "layout_cast", layout_cast)
    monkeypatch.setattr(hopper.plgpu, "transpose_ref", np.transpose)
    return calls


@pytest.mark.parametrize(
    "dtype, wanted",
    [
        # Eight nibbles move between lanes as nibbles; four bytes once they are wide.
        ("int4", [("load", plgpu.Layout.WGMMA_UPCAST_4X), ("int4", plgpu.Layout.WGMMA)]),
        ("int8", [("load", plgpu.Layout.WGMMA_UPCAST_2X), ("bfloat16", plgpu.Layout.WGMMA)]),
    ],
)
def test_widened_loads_keep_the_order_of_what_they_read(asked, dtype, wanted):
    values = np.arange(64 * 64).reshape(64, 64) % 15 - 7
    got = hopper.load_widened(jnp.asarray(values, dtype))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), values)
    assert asked == wanted


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_loads_of_8_bits_are_laid_out_as_an_accumulator(asked, dtype):
    values = np.arange(64 * 64).reshape(64, 64) % 15 - 7
    got = hopper.load_8_bits(jnp.asarray(values, dtype))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), values)
    assert asked == [("load", plgpu.Layout.WGMMA)]


def test_loads_of_one_value_a_row_or_a_column_are_laid_out_so(asked):
    vector = jnp.arange(64.0)
    for load, reduced in ((hopper.load_rows, 1), (hopper.load_columns, 0)):
        np.testing.assert_array_equal(load(vector), vector)
        assert asked.pop() == ("load", plgpu.Layout.WGMMA.reduce(reduced))


def test_another_order_of_nibbles_would_be_caught():
    """Pairs of a byte the other way round, or a byte's order of the lanes."""
    right = LAYOUTS[plgpu.Layout.WGMMA_UPCAST_4X]
    turned = right.reshape(4, 32, -1, 2, 2)[..., ::-1, :].reshape(right.shape)
    assert not np.array_equal(elements(plgpu.Layout.WGMMA_UPCAST_4X), turned)
    assert not np.array_equal(elements(plgpu.Layout.WGMMA_UPCAST_2X), right)


def test_a_transposed_store_puts_rows_where_columns_are(asked):
    memory, value = np.zeros((24, 64), np.float32), np.arange(64 * 24, dtype=np.float32)
    hopper.store_transposed(memory, value.reshape(64, 24))
    np.testing.assert_array_equal(memory, value.reshape(64, 24).T)
    assert asked == [("float32", plgpu.Layout.WGMMA_TRANSPOSED)]
