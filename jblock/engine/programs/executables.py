"""Ahead-of-time compiled programs in one table. Nothing else in the engine compiles."""

import concurrent.futures
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jblock.engine.adapters.slot_layout import (
    abstract_tables,
    table_structs,
    written_tables,
)
from jblock.engine.adapters.slot_tables import update_program
from jblock.engine.config import Bucket
from jblock.engine.kv_cache.spec import Pool, PoolShape
from jblock.engine.programs import (
    constraints,
    forward,
    logprobs,
    page_ops,
    penalties,
    pooling,
    row_moves,
    sampling,
)
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.engine.programs.keys import WRITING, Geometry, ProgramKey
from jblock.engine.signature import Signature
from jblock.engine.weights.params import abstract_params
from jblock.pallas_kernels.paged_attention.api import backend_of
from jblock.parallel.placement import SINGLE, Placement


class Executables:
    """Compiles programs, at warm-up in the background or, as a last resort, while a request waits.

    Attributes:
      placement: the devices they run on.
      compiles_on_serving_path: programs `get` had to compile.
      compiles_in_background: programs `warm` compiled.
      cache: programs of earlier starts; None compiles everything.
      version: changes with every program that is added or replaced.
    """

    def __init__(
        self,
        geometry: Geometry,
        cache: ExecutableCache | None = None,
        placement: Placement = SINGLE,
    ):
        self.geometry, self.placement = geometry, placement
        self.cache = cache
        self.compiles_on_serving_path = 0
        self.compiles_in_background = 0
        self.version = 0
        self._table: dict[ProgramKey, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: ProgramKey) -> Any:
        """The compiled program. A miss compiles on the spot and is counted against us."""
        program = self._table.get(key)
        if program is None:
            program, compiled = self._make(key)
            self.compiles_on_serving_path += compiled
        return program

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._table

    def warm(
        self,
        keys: Iterable[ProgramKey],
        workers: int,
        progress: Callable[[int, int], None] | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """Makes every program that is missing, on `workers` threads.

        Args:
          keys: programs wanted.
          workers: threads; XLA compiles without holding the interpreter lock.
          progress: called with (done, total) after each program.
          stop: when set, programs not yet begun are left out.
        """
        missing = [k for k in dict.fromkeys(keys) if k not in self._table]
        with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
            futures = [pool.submit(self._make, key, stop) for key in missing]
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                _, compiled = future.result()
                self.compiles_in_background += compiled
                if progress:
                    progress(done, len(missing))

    def workspace(self, keys: Iterable[ProgramKey]) -> int:
        """Bytes the largest of these programs, all of them made, takes beside its arguments."""
        sizes = [0]
        for key in keys:
            analysis = self._table[key].memory_analysis()
            if analysis is not None:
                fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
                sizes.append(analysis.temp_size_in_bytes + fresh)
        return max(sizes)

    def code_bytes(self, keys: Iterable[ProgramKey]) -> int:
        """Bytes of machine code of these programs, all of them made, as far as the compiler says."""
        analyses = (self._table[key].memory_analysis() for key in keys)
        return sum(a.generated_code_size_in_bytes for a in analyses if a is not None)

    def renew(self, keys: Iterable[ProgramKey], stop: threading.Event | None = None) -> None:
        """Compiles programs anew, one after another, and puts each in its old one's place: calls from
        then on use it, those enqueued end on the old one."""
        for key in dict.fromkeys(keys):
            _, compiled = self._make(key, stop, anew=True)
            self.compiles_in_background += compiled

    def _make(
        self, key: ProgramKey, stop: threading.Event | None = None, *, anew: bool = False
    ) -> tuple[Any, bool]:
        """The program of a key, from the cache or compiled (True)."""
        if stop is not None and stop.is_set():
            return None, False
        # A program is for its very devices; the default one is the first of them.
        ids = [d.id for d in self.placement.devices] or [jax.local_devices()[0].id]
        text = f"{key!r} {self.geometry!r} {self.placement.rules} {ids}"
        program = self.cache.load(text, self.placement.devices) if self.cache and not anew else None
        compiled = program is None
        if program is None:
            program = self.lower(key).compile()
            if self.cache:
                self.cache.store(text, program)
        with self._lock:
            self._table[key] = program
            self.version += 1
        return program, compiled

    def lower(self, key: ProgramKey) -> jax.stages.Lowered:
        """The program of a key, traced for its devices but not compiled."""
        function, donate, arguments, outputs = self._describe(key)
        function.__name__ = function.__qualname__ = key.name
        return self.placement.lower(function, donate, arguments, outputs)

    def _describe(self, key: ProgramKey) -> tuple[Callable[..., Any], tuple[int, ...], tuple, Any]:
        """The function of a key, its donated arguments, the arrays it is compiled for, and how its
        results are split over devices: all of them by rows, and KV pools by heads too."""
        geometry, bucket, struct = self.geometry, key.bucket, self.placement.struct
        by_rows, groups = self.placement.spec("rows"), self.placement.rules.ways("rows")
        if key.kind not in WRITING and bucket.num_seqs % groups:
            raise ValueError(f"bucket {bucket} does not divide into {groups} dp groups")
        s, slots = bucket.num_seqs, geometry.max_num_seqs * groups
        bucket = Bucket(s // groups, bucket.q_len)
        i32, f32 = jnp.int32, jnp.float32
        index = struct((s, forward.INDEX_COLUMNS + 2 * bucket.q_len), i32, "rows")
        meta = struct((s, forward.INDEX_COLUMNS), i32, "rows")
        last_tokens = struct((slots,), i32, "rows")
        logits = struct((s, key.vocab_size), f32, "rows")
        if key.kind in ("take_rows", "put_rows"):
            registers = struct((geometry.num_rows * groups, key.width), f32, "rows")
            values, ids = struct((s, key.width), f32, "rows"), struct((s,), i32, "rows")
            if key.kind == "take_rows":
                return _copy(row_moves.take_rows), (), (registers, ids), by_rows
            return _copy(row_moves.put_rows), (0,), (registers, values, ids), by_rows
        if key.kind in ("read_rows", "write_rows") and key.pool:
            return self._describe_rows(key.kind, key.pool, bucket, index)
        if key.pool and not key.signatures:
            return self._describe_pages(key.kind, key.pool)
        counts = struct((slots, key.vocab_size), i32, "rows")
        if key.kind == "set_counts":
            slot = struct((groups,), i32, "rows")
            row = struct((key.vocab_size,), i32)
            return _copy(penalties.set_counts), (0,), (counts, slot, row), by_rows
        if key.kind == "adjust":
            controls = struct((s, penalties.CONTROL_COLUMNS), i32, "rows")
            arguments = (logits, counts, last_tokens, meta, controls)
            return _copy(penalties.adjust), (1,), arguments, by_rows
        if key.kind == "constrain":
            masks = struct((s, 1 + constraints.mask_words(key.vocab_size)), i32, "rows")
            return _copy(constraints.constrain), (), (logits, meta, masks), by_rows
        if key.kind == "greedy":
            return _copy(sampling.greedy), (2,), (logits, logits, last_tokens, meta), by_rows
        if key.kind == "sampled":
            options = struct((s, sampling.OPTION_COLUMNS), i32, "rows")
            arguments = (logits, logits, last_tokens, meta, options)
            return _copy(sampling.sampled), (2,), arguments, by_rows
        if key.kind == "top_logprobs":
            return _copy(logprobs.top_logprobs), (), (logits,), by_rows
        if not key.signatures:
            raise ValueError(f"program kind {key.kind!r} needs a signature")
        signature, platform = key.signatures[0], self.placement.platform
        if key.kind in WRITING:
            spec, form = signature.specs[0], signature.forms[0]
            if form is None:
                raise ValueError(f"program kind {key.kind!r} needs a form of tables")
            all_tables = table_structs(spec, form, self.placement)
            names = written_tables(key.kind, spec, form)
            held = {name: all_tables[name] for name in names}
            rows = {
                n: jax.ShapeDtypeStruct((s, *a.shape[1:]), a.dtype, sharding=a.sharding)
                for n, a in held.items()
            }
            writing = (held, rows, struct((s,), i32))
            return _copy(update_program), (0,), writing, self._specs(held)
        registers = struct((geometry.num_rows * groups, signature.hidden_size), f32, "rows")
        tables = tuple(abstract_tables(s, self.placement) for s in key.signatures)
        if key.kind == "embedding":
            return (
                forward.embedding_program(signature, bucket, platform),
                (2,),
                (self._params(signature), tables[0], registers, last_tokens, index),
                by_rows,
            )
        if key.kind == "stitch":
            both = tuple(
                struct((geometry.num_rows * groups, width), f32, "rows")
                for width in signature.widths
            )
            return (
                forward.stitch_program(signature, bucket, platform),
                (2,),
                (self._params(signature), struct((s,), i32, "rows"), both, index),
                by_rows,
            )
        if key.kind == "head":
            return (
                forward.head_program(signature, bucket, platform),
                (),
                (self._params(signature), tables[0], registers, index),
                by_rows,
            )
        if key.kind == "greedy_head":
            return (
                forward.greedy_head_program(signature, bucket, platform),
                (3,),
                (self._params(signature), tables[0], registers, last_tokens, index),
                by_rows,
            )
        if key.kind == "prompt_logprobs":
            targets = struct((s, bucket.q_len), i32, "rows")
            return (
                logprobs.prompt_logprobs_program(signature, bucket, platform),
                (),
                (self._params(signature), tables[0], registers, index, targets),
                by_rows,
            )
        if key.kind == "pooling":
            firsts = struct((s,), i32, "rows")
            return (
                pooling.pooling_program(signature, bucket, platform),
                (),
                (self._params(signature), tables[0], registers, index, firsts),
                by_rows,
            )
        count = sum(len(s.attentions) for s in key.signatures)
        if key.pool is None and count:
            raise ValueError("a layer with attention needs the shape of its KV pool")
        pool: tuple = ()
        page_tables: tuple | jax.ShapeDtypeStruct = ()
        backend = backend_of(platform.name)
        if count and isinstance(key.pool, PoolShape):
            backend, pool = key.pool.backend, key.pool.abstract_arrays(self.placement)
            page_tables = struct((count, s, geometry.max_pages), i32, None, "rows")
        params = tuple(self._params(s) for s in key.signatures)
        return (
            forward.segment_program(key.signatures, bucket, platform, backend),
            (2, 3),
            (params, tables, registers, pool, index, page_tables),
            (by_rows, self._specs(pool)),
        )

    def _describe_rows(
        self, kind: str, shape: Pool, bucket: Bucket, index: jax.ShapeDtypeStruct
    ) -> tuple[Callable[..., Any], tuple[int, ...], tuple, Any]:
        """The same of what moves rows between registers and pages."""
        geometry, struct = self.geometry, self.placement.struct
        pool = shape.abstract_arrays(self.placement)
        width = pool[0].shape[-1]
        count = geometry.num_rows * self.placement.rules.ways("rows")
        registers = struct((count, width), jnp.float32, "rows")
        pages = struct((index.shape[0], geometry.max_pages), jnp.int32, "rows")
        if kind == "write_rows":
            write = functools.partial(page_ops.write_rows, bucket=bucket)
            return _copy(write), (0,), (pool, registers, index, pages), self._specs(pool)
        read = functools.partial(page_ops.read_rows, bucket=bucket)
        by_rows = self.placement.spec("rows")
        return _copy(read), (0,), (registers, pool, index, pages), by_rows

    def _describe_pages(
        self, kind: str, shape: Pool
    ) -> tuple[Callable[..., Any], tuple[int, ...], tuple, Any]:
        """The same of what works on the pages of a pool."""
        groups = self.placement.rules.ways("rows")

        def ids(count: int) -> jax.ShapeDtypeStruct:
            return self.placement.struct((count * groups,), jnp.int32, "rows")

        pool = shape.abstract_arrays(self.placement)
        split = self._specs(pool)
        if kind == "zero_pages":
            return _copy(page_ops.zero_pages), (0,), (pool, ids(page_ops.ZERO_PAGES)), split
        if kind == "gather_pages":
            return _copy(page_ops.gather_pages), (), (pool, ids(page_ops.COPY_PAGES)), split
        few = dataclasses.replace(shape, num_pages=page_ops.COPY_PAGES)
        arguments = (pool, few.abstract_arrays(self.placement), ids(page_ops.COPY_PAGES))
        return _copy(page_ops.scatter_pages), (0,), arguments, split

    def _params(self, signature: Signature) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
        return abstract_params(signature, self.placement)

    def _specs(self, pools: Any) -> Any:
        """PartitionSpecs of pools that a program returns."""
        single = self.placement.rules.single
        return jax.tree.map(lambda a: None if single else a.sharding.spec, pools)


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that may be renamed without renaming the original."""
    return lambda *args: function(*args)
