"""Runs batches through blocks on one agent's devices."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jblock.blocks.spec import ComponentSpec
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.graph.graph import BlockInstance, Layer, Route, Segment, ServingGraph
from jblock.engine.kv_cache import free_memory, sizing
from jblock.engine.kv_cache.host_offload import Rates
from jblock.engine.kv_cache.page_tables import PageTables
from jblock.engine.kv_cache.spec import KVShape, PageShape, Pool
from jblock.engine.programs import needed
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.programs.executables import Executables
from jblock.engine.programs.keys import Geometry, ProgramKey
from jblock.engine.runner import batch as batching
from jblock.engine.runner import tracing
from jblock.engine.runner.batch import Batch, BatchArrays, RowMove
from jblock.engine.runner.sampler import Logits, Sampled, Sampler
from jblock.engine.runner.state import DeviceState
from jblock.engine.signature import TableForm
from jblock.parallel.placement import Placement

Calls = Sequence[tuple[Segment, Any]]


class PoolPlan(NamedTuple):
    """Sizes of pools around a change of what is served: while requests still run on what was served before,
    and after that."""

    during: needed.Pools
    after: needed.Pools


class Runner:
    """The calls on the arrays of one agent. Each enqueues work and returns without waiting for it.

    Attributes:
      num_rows: rows of each register.
      kv_bytes: that all pools together may take.
      kv_layers: what the pools there are were sized for: as `ServingGraph.kv_layers`.
      pools_held: a change is being prepared; pools keep their sizes, and tables stay, until it is there.
      weight_room: bytes of weights and slot tables beside which all of kv_bytes is free.
      executables: the compiled programs.
      state: the arrays.
      buckets: grids that may be used now; replaced as a whole when more are compiled.
      rates: of offloading and of prefill, once measured; until then nothing is offloaded.
      context_by_memory: nobody said how long sequences may be, and memory decided it.
      greedy_only: only what plain greedy requests need is compiled yet; others wait.
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
        self.placement = placement or Placement.on(config.sharding)
        ways = self.placement.rules.ways("heads")
        self.kv_bytes = config.kv_memory_mb * 10**6 or ways * free_memory.kv_budget(
            self.placement.devices
        )
        self.context_by_memory = False
        if not config.max_model_len:
            longest = max(route.chain.max_position for route in graph.routes.values())
            own = sizing.own_context(
                graph.kv_layers, longest, self.kv_bytes, config, self.placement
            )
            self.context_by_memory = own < min(longest, sizing.MOST_CONTEXT)
            config = dataclasses.replace(config, max_model_len=max(own, 2))
        self.config = config
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
        self.greedy_only = False
        self.rates: Rates | None = None
        self.kv_layers: Mapping[PageShape, int] = graph.kv_layers
        self.pools_held = False
        self.weight_room = 2**63
        pools = self.pools_for(graph)
        if not config.kv_memory_mb:
            self.kv_bytes -= ways * self._workspace(graph, pools)
            pools = self.pools_for(graph)
        self.state = DeviceState(self.executables, pools)
        if not config.kv_memory_mb and not self.placement.abstract:
            held = graph.weight_bytes + graph.table_bytes
            self.weight_room = held + free_memory.spare(self.placement.devices)
        self.state.set_registers(graph.widths)
        self._sampler = Sampler(self.state, self.executables)
        self._arrays = BatchArrays(self.state, self.num_rows, config.max_pages)
        self._calls: dict[tuple[BlockInstance, Bucket], Calls] = {}
        self._calls_version = -1

    def pools_for(
        self, graph: ServingGraph, also: Mapping[PageShape, int] | None = None
    ) -> dict[PageShape, Pool]:
        """The pools that a graph is served with, while chains of other layers run too.

        Raises:
          ValueError: the memory does not hold them.
        """
        layers = sizing.most_layers(graph.kv_layers, also or {})
        weights = graph.weight_bytes
        if self.config.weights_memory_mb:
            weights = min(weights, self.config.weights_memory_mb * 10**6)
        budget = self.kv_bytes - max(0, weights + graph.table_bytes - self.weight_room)
        return sizing.pool_shapes(layers, budget, self.config, self.placement)

    def plan_pools(self, graph: ServingGraph) -> PoolPlan:
        """The pools around a change to a graph.

        Raises:
          ValueError: the memory does not hold them.
        """
        return PoolPlan(self.pools_for(graph, self.kv_layers), self.pools_for(graph))

    def check(self, old: ServingGraph, new: ServingGraph, pools: needed.Pools) -> None:
        """Whether chains that go on being served keep their length.

        Raises:
          ValueError: one does not.
        """
        for name in old.routes.keys() & new.routes.keys():
            before = self.max_model_len(old.routes[name])
            after = self.max_model_len(new.routes[name], pools)
            if after < before:
                raise ValueError(
                    f"the KV cache of {self.kv_bytes // 10**6} MB would hold {after} tokens of model "
                    f"{name!r}, which is served with {before}: start the server with more kv_memory_mb, or "
                    "unload another model first"
                )

    @property
    def pool_shapes(self) -> dict[PageShape, Pool]:
        """The pools there are."""
        return self.state.pool_shapes

    def _workspace(self, graph: ServingGraph, pools: needed.Pools) -> int:
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
            for key in needed.program_keys(graph, largest, pools, config)
            if key.kind in ("layer", "head", "prompt_logprobs")
        ]
        self.executables.warm(keys, config.compile_workers)
        kept = min(self.longest_bytes(graph, pools), config.host_kv_memory_mb * 10**6)
        copies = kept // self.placement.rules.ways("heads")
        return 2 * self.executables.workspace(keys) + copies

    def longest_bytes(self, graph: ServingGraph, pools: needed.Pools | None = None) -> int:
        """Bytes of the pages of the longest sequence of any chain, at most."""
        pools = self.pool_shapes if pools is None else pools
        layers = {s: n for s, n in graph.kv_layers.items() if isinstance(s, KVShape)}
        each = sum(pools[shape].page_bytes * count for shape, count in layers.items())
        return self.config.max_pages * each

    def max_model_len(self, route: Route, pools: needed.Pools | None = None) -> int:
        """Most tokens of a sequence on this route, virtual ones not counted: the model's limit, the
        configured one, or what the KV pools hold."""
        pools = self.pool_shapes if pools is None else pools
        pages = min(
            ((pools[s].num_pages - 1) // len(digests) for s, digests in route.kv_digests.items()),
            default=self.executables.geometry.max_pages,
        )
        most = min(
            self.config.max_model_len, route.chain.max_position, pages * self.config.page_size
        )
        return most - route.virtual_tokens

    def limit_remedy(self, route: Route) -> str:
        """What helps against a prompt longer than a route's limit."""
        given, own = self.config.max_model_len, route.chain.max_position
        if self.max_model_len(route) < min(given, own) - route.virtual_tokens:
            return (
                "shorten the prompt, or start the server with more kv_memory_mb, or kv_dtype int8"
            )
        if given < own:
            return f"shorten the prompt, or start the server with --max_model_len={own}"
        return "shorten the prompt"

    def program_keys(
        self,
        graph: ServingGraph,
        buckets: Sequence[Bucket],
        pools: needed.Pools | None = None,
        *,
        greedy_only: bool = False,
    ) -> Iterator[ProgramKey]:
        """Every program a graph can ask for on these grids, with the pools there are or with others."""
        pools = self.pool_shapes if pools is None else pools
        return needed.program_keys(graph, buckets, pools, self.config, greedy_only=greedy_only)

    def segment_keys(self, graph: ServingGraph) -> Iterator[ProgramKey]:
        """Programs that run several layers in one call."""
        return needed.segment_keys(graph, self.pool_shapes, self.config)

    def layer_key(self, layer: Layer, bucket: Bucket) -> ProgramKey:
        """The program that runs one layer on a grid."""
        return needed.layer_key((layer,), bucket, self.pool_shapes)

    def piece_update(self, spec: ComponentSpec, form: TableForm, count: int) -> Any:
        """The program that writes so many pieces into a component's tables."""
        return self.executables.get(needed.writing_key("write_pieces", spec, form, count))

    def vector_update(self, spec: ComponentSpec, form: TableForm) -> Any:
        """The program that writes a slot's vectors into a component's tables."""
        return self.executables.get(needed.writing_key("write_vectors", spec, form, 1))

    def bits_update(self, spec: ComponentSpec, form: TableForm) -> Any:
        """The program that writes codes of few bits to a place in a component's tables."""
        return self.executables.get(needed.writing_key("write_bits", spec, form, 1))

    def begin_step(self) -> None:
        """Forgets the index arrays of the step before."""
        self._arrays.begin_step()

    def wait(self) -> None:
        """Blocks until all that was enqueued is done."""
        self.state.wait()

    def time_layer(self, layer: Layer, bucket: Bucket) -> float:
        """Seconds of one call on rows that do not exist and the null page; nothing else changes. A
        head's include the greedy sampler's. Blocks; the device should be idle."""
        self.begin_step()
        batch, state = Batch(bucket, ()), self.state
        index = self._arrays.index(batch)
        program = self.executables.get(self.layer_key(layer, bucket))
        width, kind = layer.width, layer.kind
        segment = Segment((layer,), layer.kv_shape, 0, len(layer.signature.attentions))
        jax.block_until_ready((index, state.registers[width], state.last_tokens, state.pools))
        begin = time.perf_counter()
        if kind in ("layer", "stitch"):
            self._run_segment(segment, program, index, batch, None)
        elif kind == "embedding":
            self._embed(layer, program, index)
        else:
            registers = state.registers[width]
            logits, meta = program(layer.params, layer.tables, registers, index)
            sampler = self._sampler.program("greedy", logits)
            state.last_tokens, _ = sampler(logits, logits, state.last_tokens, meta)
        jax.block_until_ready((state.registers[width], state.last_tokens))
        return time.perf_counter() - begin

    def run(
        self,
        instance: BlockInstance,
        batch: Batch,
        tables: PageTables | None,
        first: int = 0,
        last: int | None = None,
    ) -> Sampled | Logits | None:
        """Enqueues one batch through a block, or through its calls `first` to `last` alone; a head
        samples too and returns its tokens, or what is to be given to `sample`.

        Args:
          instance: the block.
          batch: items that stand there.
          tables: pages of all sequences; None: all on the null page.
          first: call to begin with; layers one by one if not 0.
          last: call to end before; None: all.
        """
        self.state.clean()
        index = self._arrays.index(batch)
        with tracing.block(instance.name, batch) if tracing.enabled() else tracing.NOTHING:
            calls = self._calls_of(instance, batch.bucket)
            if instance.kind in ("layer", "stitch"):
                columns = self.executables.geometry.max_pages
                moves = batching.row_moves(batch, tables, columns)
                # Prompts run layer by layer: a call is a layer.
                for at, (segment, program) in enumerate(calls[first:last], first):
                    for move in moves.get(at, ()):
                        self._move_rows(move, batch.bucket, index)
                    self._run_segment(segment, program, index, batch, tables)
                return None
            ((segment, program),) = calls
            (layer,) = segment.layers
            if instance.kind == "embedding":
                self._embed(layer, program, index)
                return None
            return self._sampler.run_head(layer, program, index, batch)

    def sample(self, waiting: Logits) -> Sampled:
        """Enqueues sampling of a batch with grammars; rows whose mask is not there sit out."""
        sampled = self._sampler.sample(waiting.logits, waiting.meta, waiting.batch, masked=True)
        return dataclasses.replace(sampled, scores=waiting.scores, pooled=waiting.pooled)

    def _calls_of(self, instance: BlockInstance, bucket: Bucket) -> Calls:
        """The programs of a block on a grid: whole segments where they are compiled, else layer by
        layer. Cached until a program is added."""
        if self._calls_version != self.executables.version:
            self._calls_version = self.executables.version
            self._calls.clear()
        known = self._calls.get((instance, bucket))
        if known is not None:
            return known
        calls: list[tuple[Segment, Any]] = []
        singles = iter(instance.singles)
        for segment in instance.segments:
            key = needed.layer_key(segment.layers, bucket, self.pool_shapes)
            own = [next(singles) for _ in segment.layers]
            if len(own) == 1 or key in self.executables:
                calls.append((segment, self.executables.get(key)))
            else:
                keys = (needed.layer_key(s.layers, bucket, self.pool_shapes) for s in own)
                calls += zip(own, map(self.executables.get, keys), strict=True)
        self._calls[instance, bucket] = calls
        return calls

    def forget_calls(self) -> None:
        """Call it when pools changed or blocks are served no more."""
        self._calls.clear()

    def _embed(self, layer: Layer, program: Any, index: Any) -> None:
        state, width = self.state, layer.width
        state.registers[width] = program(
            layer.params, layer.tables, state.registers[width], state.last_tokens, index
        )

    def _run_segment(
        self, segment: Segment, program: Any, index: Any, batch: Batch, tables: PageTables | None
    ) -> None:
        layers, state = segment.layers, self.state
        if layers[0].kind == "stitch":
            self._run_stitch(segment, program, index, batch)
            return
        width, shape = layers[0].width, segment.kv_shape
        pool: Any = ()
        pages: Any = ()
        if shape is not None:
            pool = state.pools[shape]
            pages = self._arrays.page_tables(segment, shape, batch, tables)
        state.registers[width], pool = program(
            segment.params,
            segment.tables,
            state.registers[width],
            pool,
            index,
            pages,
        )
        if shape is not None:
            state.pools[shape] = pool

    def _move_rows(self, move: RowMove, bucket: Bucket, index: Any) -> None:
        """Enqueues copying rows of a batch from pages to registers or the other way."""
        state, shape, pages = self.state, move.shape, self.state.put(move.pages)
        pool, registers = state.pools[shape], state.registers[shape.width]
        key = ProgramKey(kind=move.kind, bucket=bucket, pool=state.pool_shapes[shape])
        if move.kind == "read_rows":
            registers = self.executables.get(key)(registers, pool, index, pages)
            state.registers[shape.width] = registers
        else:
            state.pools[shape] = self.executables.get(key)(pool, registers, index, pages)

    def _run_stitch(self, segment: Segment, program: Any, index: Any, batch: Batch) -> None:
        (layer,), state = segment.layers, self.state
        positions = state.put(batching.stitch_positions(batch, segment))
        widths = layer.signature.widths
        registers = tuple(state.registers[w] for w in widths)
        updated = program(layer.params, positions, registers, index)
        state.registers |= dict(zip(widths, updated, strict=True))
