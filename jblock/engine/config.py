"""How one agent is set up."""

import dataclasses
from typing import NamedTuple

from jblock.parallel.rules import MeshShape, ShardingRules

# Tokens of a sequence that one step verifies, at most.
MAX_DRAFT_TOKENS = 8
DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("float32", "bfloat16", "int8")


class Bucket(NamedTuple):
    """The static grid of one program: `num_seqs` sequences of up to `q_len` new tokens each.

    q_len 1 is decoding, more is a chunk of prefill. A tuple, because it is looked up for every call.
    """

    num_seqs: int
    q_len: int

    def __str__(self) -> str:
        return f"{self.num_seqs}x{self.q_len}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one agent.

    Attributes:
      dtype: weights of the matmuls, "float32" or "bfloat16". Norms and registers are float32.
      max_num_seqs: most sequences in flight.
      max_model_len: most tokens of prompt and output of one sequence; 0: what the served models take, as
        far as the KV memory holds one such sequence (sizing.own_context).
      page_size: tokens in a KV page. 64 measured best on CPU.
      kv_dtype: of the KV pages: "float32", "bfloat16", which holds twice the tokens, or "int8" with a
        scale a token and head, which holds over three times as many. Both change outputs a little.
      kv_memory_mb: memory of all KV pools together, in 10^6 bytes; 0 takes a share of what is free
        after the parameters were loaded (memory.py).
      host_kv_memory_mb: host memory for pages of sequences that gave way to others, in 10^6 bytes,
        taken as it is needed; 0 always computes them anew.
      kv_pages: pages of every KV group at most, where fewer than the memory allows are wanted.
      decode_sizes: batch sizes decode programs are compiled for. On CPU a call of twice the rows takes 1.1 to
        1.5 times as long (250M model), so each doubling is worth its programs; 24 because its products take
        five sixths of the time of 32.
      prefill_grids: (sequences, tokens) grids prefill programs are compiled for; the token counts are
        the chunk lengths a prompt is cut into.
      share: blocks with equal contents are held and run once; off, every chain has its own.
      step_ms: milliseconds a step should take at most while sequences decode; prompts are taken through
        the blocks in pieces that fit. 200 keeps every stream at five tokens a second, about as fast as
        people read; less makes streams smoother and prompts slower.
      adapter_slots: adapters on the device at a time, of 16 ranks each on average. Tables of this size are
        there for every component that a served chain adapts.
      weights_memory_mb: parameters on the device at most, in 10^6 bytes; chains that are not asked for give
        way. 0 keeps all that are served.
      host_cache_mb: host memory for adapters, and for parameters that may give way, in 10^6 bytes.
      read_seconds: how long reading one adapter or component may take; after that its storage hangs, and
        who waits for it gets an error.
      pinned: chains that are loaded before they are asked for and never give way.
      max_draft_tokens: tokens of a sequence that may be drafted and verified in one step, where measured
        times say that it pays (`speculation`); 0 drafts none.
      compile_workers: threads that compile, before the first request and in the background.
      mesh: devices the agent spans, such as "tp=4"; "" is one. With dp sizes are of each group of devices.
    """

    dtype: str = "float32"
    max_num_seqs: int = 64
    max_model_len: int = 1024
    page_size: int = 64
    kv_dtype: str = "float32"
    kv_memory_mb: int = 0
    host_kv_memory_mb: int = 256
    kv_pages: int = 2**31 - 1
    decode_sizes: tuple[int, ...] = (1, 4, 8, 16, 24, 32, 64)
    prefill_grids: tuple[tuple[int, int], ...] = (
        (1, 16),
        (4, 16),
        (16, 16),
        (1, 64),
        (4, 64),
        (1, 256),
    )
    share: bool = True
    step_ms: int = 200
    adapter_slots: int = 32
    weights_memory_mb: int = 0
    host_cache_mb: int = 512
    read_seconds: float = 60.0
    pinned: tuple[str, ...] = ()
    max_draft_tokens: int = MAX_DRAFT_TOKENS
    compile_workers: int = 2
    mesh: str = ""

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not served; give one of {', '.join(DTYPES)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(
                f"kv_dtype {self.kv_dtype!r} is not served; give one of {', '.join(KV_DTYPES)}"
            )
        for field in ("max_num_seqs", "page_size", "kv_pages", "step_ms"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} is {value!r}; give a whole number of at least 1")
        if self.max_model_len != 0 and not (
            isinstance(self.max_model_len, int) and self.max_model_len >= 2
        ):
            raise ValueError(
                f"max_model_len is {self.max_model_len!r}; give a whole number of at least 2: one token "
                "of prompt and one of output; or 0 for what the models take"
            )
        for field in ("kv_memory_mb", "host_kv_memory_mb", "max_draft_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{field} is {value!r}; give a whole number of at least 0")
        for field in ("adapter_slots", "weights_memory_mb", "host_cache_mb"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < (field == "adapter_slots"):
                raise ValueError(
                    f"{field} is {value!r}; give a whole number of at least "
                    f"{int(field == 'adapter_slots')}"
                )
        if self.max_draft_tokens > MAX_DRAFT_TOKENS:
            raise ValueError(
                f"max_draft_tokens is {self.max_draft_tokens}; give at most {MAX_DRAFT_TOKENS}"
            )
        if not self.read_seconds > 0:
            raise ValueError(f"read_seconds is {self.read_seconds}; give more than 0")
        if not self.decode_sizes or not self.prefill_grids:
            raise ValueError("decode_sizes and prefill_grids need at least one entry each")
        _ = self.sharding  # refuses a mesh of another form

    @property
    def adapter_pieces(self) -> int:
        """Pieces of 8 ranks that the adapters on the device share."""
        return 2 * self.adapter_slots

    @property
    def decode_buckets(self) -> tuple[Bucket, ...]:
        """Decode grids up to max_num_seqs, smallest first."""
        sizes = sorted({min(s, self.max_num_seqs) for s in self.decode_sizes})
        return tuple(Bucket(s, 1) for s in sizes)

    @property
    def prefill_buckets(self) -> tuple[Bucket, ...]:
        """Prefill grids, sorted by chunk length, then by sequences."""
        grids = {Bucket(min(s, self.max_num_seqs), q) for s, q in self.prefill_grids}
        return tuple(sorted(grids, key=lambda b: (b.q_len, b.num_seqs)))

    @property
    def first_buckets(self) -> tuple[Bucket, ...]:
        """One grid for decoding and one for prefill: what has to be compiled before the first request.

        They are mid-sized, because until the others are there they carry everything.
        """
        decode = self.decode_buckets
        prefill = [b for b in self.prefill_buckets if b.num_seqs == 1] or list(self.prefill_buckets)
        return (
            min(decode, key=lambda b: abs(b.num_seqs - 16)),
            min(prefill, key=lambda b: abs(b.q_len - 64)),
        )

    @property
    def sharding(self) -> ShardingRules:
        """How the agent's devices share its blocks."""
        return ShardingRules(mesh=MeshShape.parse(self.mesh))

    @property
    def max_pages(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)
