"""Block sizes of the TPU kernel."""

import dataclasses

from jblock.pallas_kernels.tuning import Tuning

_STATE_BYTES = 30 * 2**20
_BLOCK_BYTES = 2**21  # far over what hides a copy's latency
_MOST_BLOCK_BYTES = 2**22
_CHUNK = (
    512  # keys of a long product: fewer cost a fifth more a key on v6e, and on v5e spill registers
)
_TILE_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What block sizes depend on.

    Attributes:
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: width of a head.
      page_size: tokens of a page.
      kv_dtype: name of the pages' dtype.
      max_q_len: bound on the new tokens of a sequence, rounded up to a power of two.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    max_q_len: int

    @property
    def key(self) -> str:
        """How a tuned file names the shape."""
        return (
            f"{self.heads}/{self.kv_heads}x{self.head_dim}"
            f" page {self.page_size} {self.kv_dtype} q {self.max_q_len}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """How the kernel cuts its work.

    Attributes:
      q_tokens: query tokens of a tile, a power of two; times the query heads of a kv head they are the
        rows of one matmul.
      q_tiles: tiles that share one pass over the keys.
      kv_pages: pages brought together; three such blocks are in VMEM.
      chunk_pages: pages of one matmul, a divisor of kv_pages.
      many_rows: whether scores are [keys, rows] and values are transposed for them, or [rows, keys].
    """

    q_tokens: int
    q_tiles: int
    kv_pages: int
    chunk_pages: int
    many_rows: bool = False

    def __post_init__(self):
        numbers = self.q_tokens, self.q_tiles, self.kv_pages, self.chunk_pages
        if min(numbers) < 1 or self.kv_pages % self.chunk_pages:
            raise ValueError(f"{self}: give numbers over 0, chunk_pages a divisor of kv_pages")
        if self.q_tokens & (self.q_tokens - 1):
            raise ValueError(f"q_tokens is {self.q_tokens}; give a power of two")


def heuristic(shape: Shape) -> Blocks:
    """Prefill: tiles of 128 rows, a register's width, up to eight of them to a pass over the keys (more FLOPs
    for a byte read than any chip needs), fewer where many heads would fill the memory; chunks of 512 keys,
    where they fit. Decoding: the rows there are."""
    groups = shape.heads // shape.kv_heads
    many_rows = shape.max_q_len * groups >= 128
    q_tokens = min(_up(shape.max_q_len), _down(max(1, _TILE_ROWS // groups)))
    # float32: the statistics, the sum, and queries, results and new keys and values twice each.
    tile_bytes = shape.heads * max(q_tokens, 16) * 4 * (2 * 128 + 5 * shape.head_dim)
    fitting = max(1, _STATE_BYTES // tile_bytes)
    q_tiles = min(8, -(-64 // shape.kv_heads), -(-shape.max_q_len // q_tokens), fitting)
    item = {"float32": 4, "bfloat16": 2}.get(shape.kv_dtype, 1)
    token_bytes = 2 * shape.kv_heads * shape.head_dim * item
    tokens = max(128, min(1024, _down(_BLOCK_BYTES // token_bytes)))
    if many_rows and _CHUNK * token_bytes <= _MOST_BLOCK_BYTES:
        tokens = max(tokens, _CHUNK)
    kv_pages = _down(max(1, tokens // shape.page_size))
    chunk_pages = min(kv_pages, _down(max(1, _CHUNK // shape.page_size)))
    many_rows = many_rows and chunk_pages * shape.page_size % 128 == 0
    return Blocks(
        q_tokens=q_tokens,
        q_tiles=q_tiles,
        kv_pages=kv_pages,
        chunk_pages=chunk_pages,
        many_rows=many_rows,
    )


def _down(n: int) -> int:
    """Greatest power of two that is not over n."""
    return 1 << (n.bit_length() - 1)


def _up(n: int) -> int:
    """Least power of two that is not under n."""
    return 1 << (n - 1).bit_length()


TUNING = Tuning("paged_attention", Blocks, heuristic)
