"""Ahead-of-time compiled programs in one table. Nothing else in the engine compiles."""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jblock.blocks.spec import UnembeddingSpec
from jblock.engine import adjust, logprobs, programs, sampling
from jblock.engine.config import Bucket
from jblock.engine.executable_cache import ExecutableCache
from jblock.engine.params import abstract_params, abstract_tables
from jblock.engine.signature import Signature
from jblock.pallas_kernels.paged_attention.api import abstract_pages

SCRUB_PAGES = 16
# Copied in one call: few, because a call moves them all even where fewer are wanted.
SWAP_PAGES = 4
_ANY = Bucket(1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolShape:
    """One KV group's pools: the page arrays of `layers` layers."""

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    layers: int
    dtype: str = "float32"

    def abstract_layer(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of one layer's pages."""
        return abstract_pages(
            self.num_pages, self.page_size, self.num_kv_heads, self.head_dim, dtype=self.dtype
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        arrays = self.abstract_layer()
        return self.layers * sum(a.size // self.num_pages * a.dtype.itemsize for a in arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes every program of an agent shares.

    Attributes:
      num_rows: rows of each register.
      max_num_seqs: entries of the last-token array.
      max_pages: columns of a page table.
    """

    num_rows: int
    max_num_seqs: int
    max_pages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramKey:
    """Names one program: its kind, and what decides its shapes.

    Attributes:
      kind: "embedding", "layer" (one, or a segment of them), "head", "prompt_logprobs", "adjust",
        "greedy", "sampled", "top_logprobs", "set_counts", "scrub", "gather_pages" or
        "scatter_pages".
      bucket: grid of the batch; what works on logits ignores its q_len, and carries 1.
      signatures: of an embedding, a head or prompt_logprobs, or of the layers of a segment in order.
      pool: of layers and of what works on pages.
      vocab_size: of what works on logits, and of set_counts.
    """

    kind: str
    bucket: Bucket = dataclasses.field(default=_ANY)
    signatures: tuple[Signature, ...] = ()
    pool: PoolShape | None = None
    vocab_size: int = 0

    @property
    def name(self) -> str:
        """What a trace calls the program."""
        what = self.signatures[0].name if self.signatures else self.kind
        if len(self.signatures) > 1:
            what = f"{len(self.signatures)}x{what}"
        if self.kind == "prompt_logprobs":
            what = f"{self.kind}_{what}"
        return f"{what}_{self.bucket}"


class Executables:
    """Compiles programs, at warm-up in the background or, as a last resort, while a request waits.

    Attributes:
      compiles_on_serving_path: programs `get` had to compile.
      compiles_in_background: programs `warm` compiled.
      cache: programs of earlier starts; None compiles everything.
      version: changes with every program that is added or replaced.
    """

    def __init__(self, geometry: Geometry, cache: ExecutableCache | None = None):
        self.geometry = geometry
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
        text = f"{key!r} {self.geometry!r}"
        program = self.cache.load(text) if self.cache and not anew else None
        compiled = program is None
        if program is None:
            function, donate, arguments = self._describe(key)
            function.__name__ = function.__qualname__ = key.name
            program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
            if self.cache:
                self.cache.store(text, program)
        with self._lock:
            self._table[key] = program
            self.version += 1
        return program, compiled

    def _describe(self, key: ProgramKey) -> tuple[Callable[..., Any], tuple[int, ...], tuple]:
        """The function of a key, its donated arguments, and the shapes it is compiled for."""
        geometry, bucket = self.geometry, key.bucket
        s = bucket.num_seqs
        i32, f32 = jnp.int32, jnp.float32
        index = jax.ShapeDtypeStruct((s, programs.INDEX_COLUMNS + 2 * bucket.q_len), i32)
        meta = jax.ShapeDtypeStruct((s, programs.INDEX_COLUMNS), i32)
        page_table = jax.ShapeDtypeStruct((s, geometry.max_pages), i32)
        last_tokens = jax.ShapeDtypeStruct((geometry.max_num_seqs,), i32)
        logits = jax.ShapeDtypeStruct((s, key.vocab_size), f32)
        if key.pool and not key.signatures:
            return self._describe_pages(key.kind, key.pool)
        counts = jax.ShapeDtypeStruct((geometry.max_num_seqs, key.vocab_size), i32)
        if key.kind == "set_counts":
            slot = jax.ShapeDtypeStruct((1,), i32)
            row = jax.ShapeDtypeStruct((key.vocab_size,), i32)
            return _copy(adjust.set_counts), (0,), (counts, slot, row)
        if key.kind == "adjust":
            controls = jax.ShapeDtypeStruct((s, adjust.CONTROL_COLUMNS), i32)
            return _copy(adjust.adjust), (1,), (logits, counts, last_tokens, meta, controls)
        if key.kind == "greedy":
            return _copy(sampling.greedy), (2,), (logits, logits, last_tokens, meta)
        if key.kind == "sampled":
            options = jax.ShapeDtypeStruct((s, sampling.OPTION_COLUMNS), i32)
            return _copy(sampling.sampled), (2,), (logits, logits, last_tokens, meta, options)
        if key.kind == "top_logprobs":
            return _copy(logprobs.top_logprobs), (), (logits,)
        if not key.signatures:
            raise ValueError(f"program kind {key.kind!r} needs a signature")
        signature = key.signatures[0]
        registers = jax.ShapeDtypeStruct((geometry.num_rows, signature.hidden_size), f32)
        if key.kind == "embedding":
            return (
                programs.embedding_program(signature, bucket),
                (1,),
                (abstract_params(signature), registers, last_tokens, index),
            )
        if key.kind == "head":
            return (
                programs.head_program(signature, bucket),
                (),
                (abstract_params(signature), registers, index),
            )
        if key.kind == "prompt_logprobs":
            targets = jax.ShapeDtypeStruct((s, bucket.q_len), i32)
            return (
                logprobs.prompt_logprobs_program(signature, bucket),
                (),
                (abstract_params(signature), registers, index, targets),
            )
        count = sum(len(s.attentions) for s in key.signatures)
        if key.pool is None and count:
            raise ValueError("a layer with attention needs the shape of its KV pool")
        pools = tuple(key.pool.abstract_layer() for _ in range(count)) if key.pool else ()
        params = tuple(abstract_params(s) for s in key.signatures)
        tables = tuple(abstract_tables(s) for s in key.signatures)
        return (
            programs.segment_program(key.signatures, bucket),
            (2, 3),
            (params, tables, registers, pools, index, page_table),
        )

    @staticmethod
    def _describe_pages(
        kind: str, pool: PoolShape
    ) -> tuple[Callable[..., Any], tuple[int, ...], tuple]:
        """The same of what works on the pages of a group."""

        def ids(count: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count,), jnp.int32)

        def layers(shape: PoolShape) -> tuple:
            return tuple(shape.abstract_layer() for _ in range(shape.layers))

        if kind == "scrub":
            return _copy(programs.scrub_program), (0,), (layers(pool), ids(SCRUB_PAGES))
        if kind == "gather_pages":
            return _copy(programs.gather_pages_program), (), (layers(pool), ids(SWAP_PAGES))
        copies = layers(dataclasses.replace(pool, num_pages=SWAP_PAGES))
        arguments = (layers(pool), copies, ids(SWAP_PAGES))
        return _copy(programs.scatter_pages_program), (0,), arguments


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that may be renamed without renaming the original."""
    return lambda *args: function(*args)


def vocab_size(signature: Signature) -> int:
    """Width of a head's logits."""
    last = signature.specs[-1]
    if not isinstance(last, UnembeddingSpec):
        raise ValueError(f"a head ends with an unembedding, not with {last.kind}")
    return last.vocab_size
