"""What lives on the device beside parameters: registers, KV pools, last tokens; and the calls on them."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters.slot_layout import piece_widths, slot_tables
from jblock.engine.adapters.slot_tables import WRITE_SIZES
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.graph.graph import BlockInstance, KvGroup, Layer, Route, ServingGraph
from jblock.engine.kv_cache import sizing as memory
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.programs.executables import (
    SCRUB_PAGES,
    SWAP_PAGES,
    Executables,
    Geometry,
    ProgramKey,
    vocab_size,
)
from jblock.engine.programs.penalties import count_row
from jblock.engine.runner import batch as batching
from jblock.engine.runner import tracing
from jblock.engine.runner.batch import Batch
from jblock.engine.signature import Signature, TableForm
from jblock.parallel.placement import Placement

Calls = Sequence[tuple[tuple[Layer, ...], Any]]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens on their way from the device.

    Attributes:
      batch: whose.
      packed: int32 [S, 3] as sampling.py describes.
      top: int32 [S, 2K] as `top_logprobs` describes, if a row wants it.
      scores: float32 [S, Q] as `prompt_logprobs_program` describes, if a row wants it.
    """

    batch: Batch
    packed: jax.Array
    top: jax.Array | None = None
    scores: jax.Array | None = None


class Runner:
    """The mutable arrays of one agent. Every call enqueues work and returns without waiting for it.

    Attributes:
      num_rows: rows of each register.
      pool_shapes: pages of each KV group.
      executables: the compiled programs.
      buckets: grids that may be used now; replaced as a whole when more are compiled.
      rates: of swapping and of prefill, once measured; until then nothing is swapped.
      plain_only: only what plain greedy requests need is compiled yet; others wait.
    """

    def __init__(
        self,
        graph: ServingGraph,
        config: EngineConfig,
        cache: ExecutableCache | None = None,
        placement: Placement | None = None,
    ):
        """Allocates registers and pools for a graph, on the devices of this process unless another
        placement is given. On an abstract one nothing is allocated and nothing runs, but its programs can
        be named and made.

        Raises:
          ValueError: the KV memory given does not hold one sequence of the longest length, or there
            is none left.
        """
        self.config = config
        self.placement = placement or Placement.on(config.sharding)
        self._on_host = not self.placement.devices and jax.default_backend() == "cpu"
        # Chunks of prompts in a step: those of the largest grid; where steps may take longer, more.
        grid = max(b.num_seqs * b.q_len for b in config.prefill_buckets)
        most = config.max_num_seqs * max(b.q_len for b in config.prefill_buckets)
        longer = max(1, config.step_ms // EngineConfig.step_ms)
        self.num_rows = config.max_num_seqs + max(grid, min(longer * grid, most))
        self.executables = Executables(
            Geometry(
                num_rows=self.num_rows,
                max_num_seqs=config.max_num_seqs,
                max_pages=config.max_pages,
            ),
            cache,
            self.placement,
        )
        self.buckets: tuple[Bucket, ...] = (*config.decode_buckets, *config.prefill_buckets)
        self.plain_only = False
        self.rates: Rates | None = None
        groups = sorted({g for route in graph.routes.values() for g in route.groups})
        ways = self.placement.rules.ways("heads")
        budget = config.kv_memory_mb * 10**6 or ways * memory.kv_budget(self.placement.devices)
        self.pool_shapes = memory.pool_shapes(groups, budget, config, self.placement)
        if not config.kv_memory_mb:
            budget -= ways * self._workspace(graph)
            self.pool_shapes = memory.pool_shapes(groups, budget, config, self.placement)
        self._pools = {
            group: [
                tuple(self.placement.zeros(a) for a in shape.abstract_layer(self.placement))
                for _ in range(shape.layers)
            ]
            for group, shape in self.pool_shapes.items()
        }
        self._unclean: dict[KvGroup, list[int]] = {}
        widths = _widths(graph)
        self._registers = {d: self._zeros((self.num_rows, d), jnp.float32) for d in widths}
        self._positions: dict[int, jax.Array] = {}  # Of stitches, as scalars.
        self._last_tokens = self._zeros((config.max_num_seqs,), jnp.int32)
        self._counts: dict[int, jax.Array] = {}  # By vocabulary, once a request has penalties.
        self._arrays: dict[tuple, jax.Array | np.ndarray] = {}

    def _workspace(self, graph: ServingGraph) -> int:
        """Bytes to keep free on each device beside its part of the pools: what the largest programs
        need, for two steps are enqueued at a time, and copies of one sequence's pages on their way to
        the host. The programs are made here; unless the pools shrink for it they are those that serve."""
        config = self.config
        largest = (
            max(config.decode_buckets),
            max(config.prefill_buckets, key=lambda b: b.num_seqs * b.q_len),
        )
        keys = [
            key
            for key in self.program_keys(graph, largest)
            if key.kind in ("layer", "head", "prompt_logprobs")
        ]
        self.executables.warm(keys, config.compile_workers)
        copies = self.longest_bytes // self.placement.rules.ways("heads")
        return 2 * self.executables.workspace(keys) + copies

    @property
    def longest_bytes(self) -> int:
        """Bytes of the pages of the longest sequence."""
        return sum(self.config.max_pages * s.page_bytes for s in self.pool_shapes.values())

    def max_model_len(self, route: Route) -> int:
        """Most tokens of a sequence on this route, virtual ones not counted: the model's limit, the
        configured one, or what the KV pools hold."""
        held = (self.pool_shapes[g].num_pages - 1 for g in route.groups)
        pages = min(held, default=self.config.max_pages)
        most = min(
            self.config.max_model_len, route.chain.max_position, pages * self.config.page_size
        )
        return most - route.virtual_tokens

    def limit_remedy(self, limit: int) -> str:
        """What helps against a prompt longer than a route's limit."""
        held = min(s.num_pages - 1 for s in self.pool_shapes.values()) * self.config.page_size
        if limit < held:
            return "shorten the prompt"
        return "shorten the prompt, or start the server with more kv_memory_mb, or kv_dtype int8"

    def _zeros(self, shape: tuple[int, ...], dtype) -> jax.Array:
        return self.placement.zeros(self.placement.struct(shape, dtype, "rows"))

    def _put(self, array: np.ndarray) -> jax.Array | np.ndarray:
        """A small array of a batch, on every device. A CPU by itself takes numpy's as it is: a call with
        one costs a microsecond more, a transfer before it 30."""
        if self._on_host:
            return array
        return self.placement.put(array, "rows")

    def check(self, graph: ServingGraph) -> None:
        """Whether a graph fits what was allocated.

        Raises:
          ValueError: it needs a register width or KV shape this agent has no arrays for.
        """
        widths = _widths(graph)
        groups = {g for route in graph.routes.values() for g in route.groups}
        if not widths <= set(self._registers) or not groups <= set(self.pool_shapes):
            raise ValueError(
                "a model of another hidden size or KV shape than those loaded at the start cannot be "
                "added to a running engine: name it in --models and start again"
            )

    def program_keys(
        self, graph: ServingGraph, buckets: Sequence[Bucket], *, plain: bool = False
    ) -> Iterator[ProgramKey]:
        """Every program the graph can ask for on these grids; with `plain`, for plain greedy
        requests only."""
        units = [u for i in graph.instances for u in i.units]
        vocabs = {vocab_size(u.signature) for u in units if u.signature.kind == "head"}
        kinds = ("greedy",) if plain else ("greedy", "sampled", "adjust", "top_logprobs")
        for bucket in buckets:
            for unit in units:
                yield self._key((unit,), bucket)
                if unit.signature.kind == "head" and bucket.q_len > 1 and not plain:
                    yield _scoring_key(unit, bucket)
            for vocab in vocabs:
                size = Bucket(bucket.num_seqs, 1)
                for kind in kinds:
                    yield ProgramKey(kind=kind, bucket=size, vocab_size=vocab)
        if not plain:
            for vocab in vocabs:
                yield ProgramKey(kind="set_counts", vocab_size=vocab)
        for shape in self.pool_shapes.values():
            yield ProgramKey(kind="scrub", pool=shape)
            if self.config.host_kv_memory_mb:
                yield ProgramKey(kind="gather_pages", pool=shape)
                yield ProgramKey(kind="scatter_pages", pool=shape)
        for signature in {u.signature for u in units}:
            for spec, form in zip(signature.specs, signature.forms, strict=True):
                if form is not None and piece_widths(spec, form):
                    for count in WRITE_SIZES:
                        yield _writing_key("write_pieces", spec, form, count)
                if form is not None and slot_tables(spec, form):
                    yield _writing_key("write_vectors", spec, form, 1)

    def segment_keys(self, graph: ServingGraph) -> Iterator[ProgramKey]:
        """Programs that run several layers in one call: a tier that saves time but that nothing waits
        for. Decoding only; a chunk of prefill is long enough to hide what a call costs."""
        for instance in graph.instances:
            for segment in instance.segments:
                if len(segment) > 1:
                    for bucket in self.config.decode_buckets:
                        yield self._key(segment, bucket)

    def begin_step(self) -> None:
        """Forgets the index arrays of the step before."""
        self._arrays.clear()

    def scrub(self, group: KvGroup, pages: Sequence[int]) -> None:
        """Has pages zeroed that were just handed to a new owner, before anything else is done to pages: many
        in a call, for a burst of requests takes a page or two each."""
        self._unclean.setdefault(group, []).extend(pages)

    def _clean(self) -> None:
        for group, pages in self._unclean.items():
            shape = self.pool_shapes[group]
            program = self.executables.get(ProgramKey(kind="scrub", pool=shape))
            for begin in range(0, len(pages), SCRUB_PAGES):
                ids = np.full(SCRUB_PAGES, shape.num_pages, np.int32)
                part = pages[begin : begin + SCRUB_PAGES]
                ids[: len(part)] = part
                self._pools[group] = list(program(tuple(self._pools[group]), self._put(ids)))
        self._unclean.clear()

    def copy_out(self, group: KvGroup, pages: Sequence[int]) -> list[Any]:
        """Begins to copy pages to the host. What comes back is for `copy_in`, as it is or with its
        arrays taken to the host."""
        self._clean()
        program = self.executables.get(
            ProgramKey(kind="gather_pages", pool=self.pool_shapes[group])
        )
        copies = []
        for begin in range(0, len(pages), SWAP_PAGES):
            ids = np.zeros(SWAP_PAGES, np.int32)
            part = pages[begin : begin + SWAP_PAGES]
            ids[: len(part)] = part
            copy = program(tuple(self._pools[group]), self._put(ids))
            for array in jax.tree.leaves(copy):
                array.copy_to_host_async()
            copies.append(copy)
        return copies

    def copy_in(
        self, group: KvGroup, pages: Sequence[int], copies: Sequence[Any], skip: int = 0
    ) -> None:
        """Overwrites pages with the copies of as many pages; the first `skip` stay as they are."""
        self._clean()
        shape = self.pool_shapes[group]
        program = self.executables.get(ProgramKey(kind="scatter_pages", pool=shape))
        for begin in range(skip // SWAP_PAGES * SWAP_PAGES, len(pages), SWAP_PAGES):
            ids = np.full(SWAP_PAGES, shape.num_pages, np.int32)
            part = pages[begin : begin + SWAP_PAGES]
            ids[: len(part)] = part
            ids[: max(skip - begin, 0)] = shape.num_pages
            copy = copies[begin // SWAP_PAGES]
            self._pools[group] = list(program(tuple(self._pools[group]), copy, self._put(ids)))

    def wait(self) -> None:
        """Blocks until all that was enqueued is done."""
        jax.block_until_ready((self._registers, self._pools, self._last_tokens))

    def piece_update(self, spec: ComponentSpec, form: TableForm, count: int) -> Any:
        """The program that writes so many pieces into a component's tables."""
        return self.executables.get(_writing_key("write_pieces", spec, form, count))

    def vector_update(self, spec: ComponentSpec, form: TableForm) -> Any:
        """The program that writes a slot's vectors into a component's tables."""
        return self.executables.get(_writing_key("write_vectors", spec, form, 1))

    def time_unit(self, unit: Layer, bucket: Bucket) -> float:
        """Seconds of one call on rows that do not exist and the null page; nothing else changes. A
        head's include the greedy sampler's. Blocks; the device should be idle."""
        self.begin_step()
        batch = Batch(bucket, ())
        index = self._index(batch)
        program = self.executables.get(self._key((unit,), bucket))
        width, group = unit.signature.hidden_size, unit.group
        registers = self._registers[width]
        if group is not None:
            self._page_table(batch, group)
        jax.block_until_ready((index, registers, self._last_tokens, list(self._pools.values())))
        begin = time.perf_counter()
        if unit.signature.kind in ("layer", "stitch"):
            self._run_segment((unit,), program, index, batch)
        elif unit.signature.kind == "embedding":
            self._embed(unit, program, index)
        else:
            logits, meta = program(unit.params, unit.tables, registers, index)
            sampler = self._logits_program("greedy", logits)
            self._last_tokens, _ = sampler(logits, logits, self._last_tokens, meta)
        jax.block_until_ready((self._registers[width], self._last_tokens))
        return time.perf_counter() - begin

    def run(
        self, instance: BlockInstance, batch: Batch, first: int = 0, last: int | None = None
    ) -> Sampled | None:
        """Enqueues one batch through a block, or through its calls `first` to `last` alone; a head
        samples too and returns its tokens."""
        self._clean()
        index = self._index(batch)
        with tracing.block(instance.name, batch):
            calls = self._calls(instance, batch.bucket)
            kind = instance.units[0].signature.kind
            if kind in ("layer", "stitch"):
                for segment, program in calls[first:last]:
                    self._run_segment(segment, program, index, batch)
                return None
            ((unit,), program) = calls[0]
            if kind == "embedding":
                self._embed(unit, program, index)
                return None
            registers = self._registers[unit.signature.hidden_size]
            logits, meta = program(unit.params, unit.tables, registers, index)
            sampled = self._sample(logits, meta, batch)
            if any(item.scores for item in batch.items):
                program = self.executables.get(_scoring_key(unit, batch.bucket))
                targets = self._put(batching.target_array(batch))
                scores = program(unit.params, unit.tables, registers, index, targets)
                sampled = dataclasses.replace(sampled, scores=scores)
            return sampled

    def _calls(self, instance: BlockInstance, bucket: Bucket) -> Calls:
        """The programs of a block on a grid: whole segments where they are compiled, else layer by
        layer. Looked up anew only when a program has come since."""
        version = self.executables.version
        known = instance.calls_by_bucket.get(bucket)
        if known is not None and known[0] == version:
            return known[1]
        calls: list[tuple[tuple[Layer, ...], Any]] = []
        for segment in instance.segments:
            key = self._key(segment, bucket)
            if len(segment) == 1 or key in self.executables:
                calls.append((segment, self.executables.get(key)))
            else:
                singles = ((unit,) for unit in segment)
                calls.extend((u, self.executables.get(self._key(u, bucket))) for u in singles)
        instance.calls_by_bucket[bucket] = (version, calls)
        return calls

    def _embed(self, unit: Layer, program, index) -> None:
        width = unit.signature.hidden_size
        self._registers[width] = program(
            unit.params, unit.tables, self._registers[width], self._last_tokens, index
        )

    def _run_segment(self, segment: Sequence[Layer], program, index, batch: Batch) -> None:
        if segment[0].signature.kind == "stitch":
            self._run_stitch(segment[0], program, index)
            return
        width, group = segment[0].signature.hidden_size, segment[0].group
        layers = [u.kv_layer for u in segment if u.group is not None]
        pools = self._pools[group] if group is not None else []
        pages = self._page_table(batch, group or next(iter(self.pool_shapes)))
        self._registers[width], updated = program(
            tuple(u.params for u in segment),
            tuple(u.tables for u in segment),
            self._registers[width],
            tuple(pools[i] for i in layers),
            index,
            pages,
        )
        for i, new in zip(layers, updated, strict=True):
            pools[i] = new

    def _run_stitch(self, unit: Layer, program, index) -> None:
        if unit.position not in self._positions:
            self._positions[unit.position] = self.placement.put(np.array(unit.position, np.int32))
        widths = unit.signature.widths
        registers = tuple(self._registers[w] for w in widths)
        updated = program(unit.params, self._positions[unit.position], registers, index)
        self._registers |= dict(zip(widths, updated, strict=True))

    def _sample(self, logits: jax.Array, meta: jax.Array, batch: Batch) -> Sampled:
        """Picks tokens; what no row of the batch asks for is not run."""
        wanted = [i.sequence.request.sampling for i in batch.items]
        adjusted = logits
        if any(w.adjusts_logits for w in wanted):
            adjusted = self._adjust(logits, meta, batch)
        greedy = all(w.temperature == 0 for w in wanted)
        program = self._logits_program("greedy" if greedy else "sampled", logits)
        options = () if greedy else (self._put(batching.option_array(batch)),)
        self._last_tokens, packed = program(logits, adjusted, self._last_tokens, meta, *options)
        top = None
        if any(w.top_logprobs for w in wanted):
            top = self._logits_program("top_logprobs", logits)(logits)
        return Sampled(batch, packed, top)

    def _adjust(self, logits: jax.Array, meta: jax.Array, batch: Batch) -> jax.Array:
        """Logits with biases and penalties; sequences that begin here bring their counts."""
        vocab = logits.shape[1]
        counts = self._counts.pop(vocab, None)
        if counts is None:
            counts = self._zeros((self.config.max_num_seqs, vocab), jnp.int32)
        for item in batch.items:
            sequence = item.sequence
            if item.tokens and sequence.request.sampling.adjusts_logits:
                row = count_row(sequence.request.token_ids, sequence.generated, vocab)
                slot = np.array([sequence.seq_slot], np.int32)
                program = self.executables.get(ProgramKey(kind="set_counts", vocab_size=vocab))
                counts = program(counts, self._put(slot), self.placement.put(row))
        controls = self._put(batching.control_array(batch))
        program = self._logits_program("adjust", logits)
        adjusted, self._counts[vocab] = program(logits, counts, self._last_tokens, meta, controls)
        return adjusted

    def _logits_program(self, kind: str, logits: jax.Array):
        size, vocab = logits.shape
        return self.executables.get(ProgramKey(kind=kind, bucket=Bucket(size, 1), vocab_size=vocab))

    def unit_key(self, unit: Layer, bucket: Bucket) -> ProgramKey:
        """The program that runs one unit on a grid."""
        return self._key((unit,), bucket)

    def _key(self, units: Sequence[Layer], bucket: Bucket) -> ProgramKey:
        group = units[0].group
        return ProgramKey(
            kind=units[0].signature.kind,
            bucket=bucket,
            signatures=tuple(u.signature for u in units),
            pool=self.pool_shapes[group] if group is not None else None,
        )

    def _index(self, batch: Batch) -> jax.Array | np.ndarray:
        """The batch's index array, built once per group of rows and step."""
        key = (batch.bucket, *map(id, batch.items))
        if key not in self._arrays:
            self._arrays[key] = self._put(batching.index_array(batch, self.num_rows))
        return self._arrays[key]

    def _page_table(self, batch: Batch, group: KvGroup) -> jax.Array | np.ndarray:
        key = (group, batch.bucket, *map(id, batch.items))
        if key not in self._arrays:
            table = batching.page_table(batch, group, self.config.max_pages)
            self._arrays[key] = self._put(table)
        return self._arrays[key]


def _widths(graph: ServingGraph) -> set[int]:
    """Widths of all registers that blocks of a graph read or write."""
    return {w for i in graph.instances for u in i.units for w in u.signature.widths}


def _scoring_key(unit: Layer, bucket: Bucket) -> ProgramKey:
    """The program that scores the prompts that go through a head."""
    return ProgramKey(kind="prompt_logprobs", bucket=bucket, signatures=(unit.signature,))


def _writing_key(kind: str, spec: ComponentSpec, form: TableForm, count: int) -> ProgramKey:
    signature = Signature(specs=(spec,), forms=(form,), dtype="float32")
    return ProgramKey(kind=kind, bucket=Bucket(count, 1), signatures=(signature,))
