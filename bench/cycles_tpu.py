"""The TPU kernels' cycles, counted in what libtpu emits for chips that are not here.

A bundle is a cycle without stalls, so all figures are what a kernel can reach at best. Bundles are those
that are executed: a loop's as often as the workload goes through it. Copies run beside them: a stretch
takes the longer of the two. Beside our attention stands jax's own ragged paged attention, at the block
sizes of `_JAX_BLOCKS` that need the fewest bundles, and beside the grouped matmul megablox, compiled in
the same run.
"""

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import bundles
from bench.bundles import Region
from bench.report import progress
from jblock.pallas_kernels.grouped_block_matmul import shapes as grouped
from jblock.pallas_kernels.grouped_block_matmul import tpu as grouped_tpu
from jblock.pallas_kernels.paged_attention import shapes as attention
from jblock.pallas_kernels.paged_attention import tpu_blocks
from jblock.pallas_kernels.quantized_matmul import shapes as quantized
from jblock.pallas_kernels.quantized_matmul import tpu as quantized_tpu
from jblock.parallel.placement import Placement
from jblock.parallel.rules import MeshShape, ShardingRules
from jblock.parallel.targets import CHIPS, Target

CHIP_NAMES = ("v5e", "v6e")
# Hz, and what the matrix units of a chip do in a cycle: a product of 4096 cubed takes 1,083,068 cycles on
# v5e and 301,616 on v6e by XLA's own reckoning, which is 4% and 15% over these.
_CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}
# (KV pages, queries) of a block: the best on both chips of 1 to 16 pages by 16 to 128 queries, whose
# other ends take minutes to compile.
_JAX_BLOCKS = ((4, 32),)
_LLAMA = next(m for m in attention.MODELS if m.name == "llama-3-8b")
_WINDOWED = next(m for m in attention.MODELS if m.name == "gemma-3-27b-local")
_DECODE = attention.Batch(name="decode 512", num_seqs=64, rows=64, max_q_len=1, max_len=512)
_MIXED = next(b for b in attention.BATCHES if b.name == "mixed")
_TILE = (8, 128, 512)
"""Heads of a kv head's rows, rows and keys that a full tile of prefill is told for."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program.

    Attributes:
      kernel: its largest kernel's schedule.
      glue: XLA's own estimate of the cycles of everything around it.
      copies: of these, those of copies and transpositions.
    """

    kernel: Region
    glue: int
    copies: int


class Chip:
    """A chip to compile for."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        target = Target.parse(f"tpu:{name}:1x1")
        rules = ShardingRules(mesh=MeshShape(tp=1))
        self.placement = Placement.on(rules, target.devices(), abstract=True)
        self.spills: dict[str, int] = {}

    @property
    def kind(self) -> str:
        """As jax names it."""
        return self.placement.platform.kind

    @property
    def flops_per_cycle(self) -> float:
        """Of its matrix units, bfloat16."""
        return CHIPS[self.name].flops / _CLOCK[self.name]

    def copy_cycles(self, moved: float) -> float:
        """Cycles in which its memory moves that many bytes."""
        return moved / CHIPS[self.name].bandwidth * _CLOCK[self.name]

    def compile(
        self,
        name: str,
        fn: Callable,
        arguments: Any,
        donate: tuple[int, ...] = (),
        ours: bool = True,
    ) -> Compiled:
        """Compiles a program and reads its schedule."""
        before = set(self.folder.iterdir())
        on_chip = jax.tree.map(lambda a: self.placement.struct(a.shape, a.dtype), arguments)
        text = self.placement.lower(fn, donate, on_chip, None).compile().as_text()
        written = [
            p
            for p in set(self.folder.iterdir()) - before
            if p.name.endswith("-final_bundles.txt") and "schedule-analysis" not in p.name
        ]
        kernel = bundles.parse(max(written, key=lambda p: p.stat().st_size).read_text())
        for p in set(self.folder.iterdir()) - before:
            p.unlink()
        costs = [
            (int(m[1]), line)
            for line in text.splitlines()
            if (m := re.search(r'estimated_cycles":"(\d+)"', line)) and "custom-call" not in line
        ]
        moves = sum(c for c, line in costs if re.search(r"= \S+ (copy|transpose)|/transpose", line))
        spills = kernel.total(lambda r: r.spills)
        if ours:
            self.spills[name] = spills
        progress(f"{self.name} {name}: {kernel.total()} bundles, {spills} spills")
        return Compiled(kernel, sum(c for c, _ in costs), moves)


def run(chips: Sequence[str], quick: bool) -> dict[str, Any]:
    """{chip: figures}. Nothing may have been compiled for a TPU before in this process.

    Raises:
      ValueError: libtpu is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        bundles.dumping(Path(folder))
        return {name: _figures(Chip(name, Path(folder)), quick) for name in chips}


def _figures(chip: Chip, quick: bool) -> dict[str, Any]:
    result = _decode(chip)
    for bits in (8,) if quick else (8, 4):
        result.update(_quantized(chip, bits))
    if not quick:
        result.update(_prefill(chip))
        # Behind a window weights are summed another way: told for its spills alone.
        fn, arguments = attention.program(
            "tpu", _WINDOWED, _MIXED, "bfloat16", device_kind=chip.kind
        )
        chip.compile("attention mixed behind a window", fn, arguments, donate=(3,))
    result.update(_grouped(chip, quick))
    return {"spills": sum(chip.spills.values()), "spilled": chip.spills, **result}


# Attention.


def _attention(chip: Chip, batch: attention.Batch) -> tuple[Compiled, tpu_blocks.Blocks]:
    fn, arguments = attention.program("tpu", _LLAMA, batch, "bfloat16", device_kind=chip.kind)
    shape = tpu_blocks.Shape(
        heads=_LLAMA.heads,
        kv_heads=_LLAMA.kv_heads,
        head_dim=_LLAMA.head_dim,
        page_size=attention.PAGE_SIZE,
        kv_dtype="bfloat16",
        max_q_len=batch.max_q_len,
    )
    blocks = tpu_blocks.TUNING.blocks_for(shape, chip.kind)
    return chip.compile(f"attention {batch.name}", fn, arguments, donate=(3,)), blocks


def _prefill(chip: Chip) -> dict[str, Any]:
    compiled, blocks = _attention(chip, _MIXED)
    groups = _LLAMA.heads // _LLAMA.kv_heads
    rows, keys = blocks.q_tokens * groups, blocks.chunk_pages * attention.PAGE_SIZE
    heads, tile_rows, tile_keys = _TILE
    scale = tile_rows / rows * tile_keys / keys
    loops = [r for r in compiled.kernel.walk() if r.products and not r.inner]
    long = max(loops, key=lambda r: r.products)
    tile = long.total() * scale
    peak = 4 * heads * tile_rows * tile_keys * _LLAMA.head_dim / chip.flops_per_cycle
    layer = 2 * 2048 * _layer_weights() / chip.flops_per_cycle
    best = min(_jax_tile(chip, *b) for b in _JAX_BLOCKS)
    return {
        "prefill_tile": round(tile),
        "prefill_of_peak": round(peak / tile, 3),
        "prefill_2048_of_peak": round(_whole_prefill(chip, compiled.kernel, blocks, 0), 3),
        "prefill_2048_at_6144_of_peak": round(
            _whole_prefill(chip, compiled.kernel, blocks, 6144), 3
        ),
        "glue_cycles": compiled.glue,
        "glue_share": round(compiled.glue / layer, 4),
        "jax_prefill_tile": round(best),
        "prefill_over_jax": round(tile / best, 3),
    }


def _layer_weights() -> int:
    """Of one of Llama 3 8B's layers."""
    model = next(m for m in quantized.MODELS if m.name == "llama-3-8b")
    per = {n: a * b for n, (a, b) in model.projections.items()}
    return per["q"] + 2 * per["k"] + per["o"] + 2 * per["up"] + per["down"]


def _whole_prefill(chip: Chip, kernel: Region, blocks: tpu_blocks.Blocks, cached: int) -> float:
    """The share of peak that a chunk of 2048 tokens behind `cached` ones reaches: the products it needs over
    all bundles executed, each loop of the walk as often as it is gone through."""
    item_loop, block_loop, tile_loop, bodies = _attention_loops(kernel)
    page = attention.PAGE_SIZE
    block, item_tokens = blocks.kv_pages * page, blocks.q_tokens * blocks.q_tiles
    chunk = blocks.chunk_pages * page
    long = max(bodies, key=lambda r: r.products)
    short = min(bodies, key=lambda r: r.products)
    strip = chunk * short.products // long.products
    total = 0.0
    for begin in range(cached, cached + 2048, item_tokens):
        end = begin + item_tokens
        total += _besides(item_loop, block_loop, blocks.q_tiles)
        for start in range(0, end, block):
            # Whatever is in a block's loop beside tiles goes over its pages or strips.
            total += _besides(block_loop, tile_loop, blocks.kv_pages)
            for first in range(begin, end, blocks.q_tokens):
                seen = min(max(first + blocks.q_tokens - start, 0), block)
                whole = min(max(first + 1 - start, 0), block) // chunk
                strips = -(-(seen - whole * chunk) // strip)
                total += tile_loop.bundles + whole * long.total() + strips * short.total()
    needed = attention.needed(_LLAMA, ((cached, 2048),), "bfloat16")[1] / chip.flops_per_cycle
    return needed / total


def _attention_loops(kernel: Region) -> tuple[Region, Region, Region, list[Region]]:
    """The loops over items, blocks and tiles around those that multiply."""
    bodies = [r for r in kernel.walk() if r.products and not r.inner]
    around = [r for r in kernel.walk() if r.kind == "loop" and bodies[0] in r.walk()]
    around = [r for r in around if r not in bodies]
    return around[-3], around[-2], around[-1], bodies


def _besides(loop: Region, inner: Region, times: int) -> int:
    """Bundles of a loop's body without the loop `inner`: its other loops `times` times, its branches all
    taken."""

    def count(region: Region) -> int:
        if region is inner:
            return 0
        own = region.bundles + sum(map(count, region.inner))
        return own * times if region.kind == "loop" and region is not loop else own

    return count(loop)


def _jax_tile(chip: Chip, pages: int, queries: int) -> float:
    """Bundles of a full tile of jax's own kernel."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ragged_paged_attention

    seqs, max_pages = _MIXED.num_seqs, _MIXED.max_len // attention.PAGE_SIZE
    heads, kv_heads, d = _LLAMA.heads, _LLAMA.kv_heads, _LLAMA.head_dim
    struct = jax.ShapeDtypeStruct
    pool = (1 + seqs * max_pages, attention.PAGE_SIZE, 2 * kv_heads, d)
    fn = functools.partial(
        ragged_paged_attention,
        sm_scale=d**-0.5,
        num_kv_pages_per_block=pages,
        num_queries_per_block=queries,
        vmem_limit_bytes=64 * 2**20,
    )
    arguments = (
        struct((_MIXED.rows, heads, d), jnp.bfloat16),
        struct(pool, jnp.bfloat16),
        struct((seqs,), jnp.int32),
        struct((seqs, max_pages), jnp.int32),
        struct((seqs + 1,), jnp.int32),
        struct((1,), jnp.int32),
    )
    name = f"jax's attention, {pages} pages by {queries} queries"
    kernel = chip.compile(name, lambda *a: fn(*a), arguments, ours=False).kernel
    loops = [r for r in kernel.walk() if r.kind == "loop" and r.total(lambda r: r.products)]
    # The loop over blocks of keys, heads unrolled in it.
    innermost = [
        r for r in loops if not any(x.kind == "loop" and x in loops for x in r.walk() if x is not r)
    ]
    body = max(innermost, key=lambda r: r.total(lambda r: r.products))
    _, tile_rows, tile_keys = _TILE
    rows = queries * heads // kv_heads
    return body.total() * tile_rows / rows * tile_keys / (pages * attention.PAGE_SIZE)


def _decode(chip: Chip) -> dict[str, Any]:
    compiled, _ = _attention(chip, _DECODE)
    bodies = [r for r in compiled.kernel.walk() if r.products]
    around = [r for r in compiled.kernel.walk() if r.kind == "loop" and bodies[0] in r.walk()]
    # Sequences, items, blocks: a sequence of 512 tokens has one of each.
    sequence, block = around[0], around[2]
    pages = -(-512 // attention.PAGE_SIZE)
    # Loops that go round more than once are those that have a block's pages brought.
    bringing = [
        r
        for r in block.walk()
        if r.kind == "loop" and r.fetches and not r.total(lambda r: r.products)
    ]

    def executed(region: Region) -> int:
        own = region.bundles + sum(map(executed, region.inner))
        return own * pages if region in bringing else own

    each = executed(sequence)
    copied = chip.copy_cycles(512 * 4 * _LLAMA.kv_heads * _LLAMA.head_dim)
    total = 64 * max(each, copied) + copied + compiled.glue
    return {
        "decode_sequence": each,
        "decode_sequence_copied": round(copied),
        "decode_glue_cycles": compiled.glue,
        "decode_64x512_of_bandwidth": round(64 * copied / total, 3),
    }


# Matmuls.


def _quantized(chip: Chip, bits: int) -> dict[str, Any]:
    """Llama 3 8B's up projection for 16 rows: bundles over the cycles in which its memory brings it."""
    model = next(m for m in quantized.MODELS if m.name == "llama-3-8b")
    fn, arguments = quantized.program("tpu", model, "up", 16, bits, device_kind=chip.kind)
    compiled = chip.compile(f"int{bits} up 16", fn, arguments)
    width, out = model.projections["up"]
    shape = quantized_tpu.Shape(rows=16, width=width, out=out, group=quantized.GROUP, bits=bits)
    blocks = quantized_tpu.TUNING.blocks_for(shape, chip.kind)
    grid, chunks = _grid_and_product(compiled.kernel)
    steps = -(-out // blocks.columns)
    number = width // quantized.GROUP
    turns = number // quantized_tpu.chunks_together(16, number)
    each = grid.total() + chunks.total() * (turns - 1)
    copied = chip.copy_cycles(quantized.needed(model, "up", 16, bits)[0])
    return {
        f"int{bits}_bundles": steps * each,
        f"int{bits}_copied": round(copied),
        f"int{bits}_over_dma": round(max(steps * each, copied) / copied, 3),
        "relayout_cycles": compiled.copies,
    }


def _grid_and_product(kernel: Region) -> tuple[Region, Region]:
    """The loop over grid steps, and in it the innermost loop that multiplies."""
    loops = [r for r in kernel.walk() if r.kind == "loop" and r.total(lambda r: r.products)]
    return loops[0], loops[-1]


def _grouped(chip: Chip, quick: bool) -> dict[str, Any]:
    """Eight variants of Llama 3 8B's query projection on 2048 rows: an item at a group's edge over one of a
    whole block of rows; and megablox's tile beside it, for the same rows, columns and inputs."""
    model = next(m for m in grouped.MODELS if m.name == "llama-3-8b")
    fn, arguments = grouped.program("tpu", model, "q", 2048, device_kind=chip.kind)
    compiled = chip.compile("grouped q 2048", fn, arguments)
    # One branch for each size of window, the whole block last.
    windows = [r.total() for r in compiled.kernel.walk() if r.products and not r.inner]
    whole = windows[-1]
    width, out = model.projections["q"]
    shape = grouped_tpu.Shape(
        rows=2048, variants=grouped.VARIANTS, width=width, out=out, dtype="bfloat16"
    )
    blocks = grouped_tpu.TUNING.blocks_for(shape, chip.kind)
    columns = grouped_tpu.dividing(out, blocks.columns)
    peak = 2 * blocks.rows * columns * width / chip.flops_per_cycle
    figures: dict[str, Any] = {
        "grouped_whole": whole,
        "grouped_windows": windows[:-1],
        "grouped_of_peak": round(min(1.0, peak / whole), 3),
        "partial_over_whole": round(max(windows) / whole, 3),
    }
    if not quick:
        theirs = _megablox(chip, blocks.rows, columns, width, out)
        figures |= {"megablox_tile": theirs, "grouped_over_megablox": round(whole / theirs, 3)}
    return figures


def _megablox(chip: Chip, rows: int, columns: int, width: int, out: int) -> int:
    """Bundles of megablox for a tile of rows by columns over all inputs."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    struct = jax.ShapeDtypeStruct
    tiling = rows, min(width, 512), columns
    fn = functools.partial(
        gmm, preferred_element_type=jnp.float32, tiling=tiling, transpose_rhs=True
    )
    arguments = (
        struct((2048, width), jnp.bfloat16),
        struct((grouped.VARIANTS, out, width), jnp.bfloat16),
        struct((grouped.VARIANTS,), jnp.int32),
    )
    compiled = chip.compile("megablox q 2048", lambda *a: fn(*a), arguments, ours=False)
    step = max((r for r in compiled.kernel.walk() if r.products), key=lambda r: r.total())
    return step.total() * (width // tiling[1])
