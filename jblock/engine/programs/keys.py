"""Names of programs: what decides each, and the sizes all of an agent's programs share."""

import dataclasses

from jblock.blocks.spec import UnembeddingSpec
from jblock.engine.config import Bucket
from jblock.engine.kv_cache.spec import Pool
from jblock.engine.signature import Signature

WRITING = ("write_pieces", "write_vectors", "write_bits")
_ANY = Bucket(1, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes every program of an agent shares, each of one dp group.

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
      kind: "embedding", "layer" (one, or a segment of them), "stitch", "head", "greedy_head",
        "prompt_logprobs", "pooling", "adjust", "constrain", "greedy", "sampled", "top_logprobs",
        "set_counts", "zero_pages", "gather_pages", "scatter_pages", "read_rows", "write_rows", "take_rows",
        "put_rows", or one of WRITING.
      bucket: grid of the batch; what works on logits ignores its q_len, and carries 1; of write_pieces
        the number of pieces is in num_seqs, of take_rows and put_rows that of rows.
      signatures: of an embedding, a head, greedy_head, prompt_logprobs or pooling, of the layers of a segment
        in order, or of one component with slot tables.
      pool: of layers with an attention and of what works on pages.
      vocab_size: of what works on logits, and of set_counts.
      width: of the registers that take_rows and put_rows work on.
    """

    kind: str
    bucket: Bucket = dataclasses.field(default=_ANY)
    signatures: tuple[Signature, ...] = ()
    pool: Pool | None = None
    vocab_size: int = 0
    width: int = 0

    @property
    def name(self) -> str:
        """What a trace calls the program."""
        what = self.signatures[0].name if self.signatures else self.kind
        if len(self.signatures) > 1:
            what = f"{len(self.signatures)}x{what}"
        if self.kind in ("prompt_logprobs", "pooling", "greedy_head"):
            what = f"{self.kind}_{what}"
        if self.kind in WRITING:
            what = self.kind
        return f"{what}_{self.bucket}"


def vocab_size(signature: Signature) -> int:
    """Width of a head's logits."""
    last = signature.specs[-1]
    if not isinstance(last, UnembeddingSpec):
        raise ValueError(f"a head ends with an unembedding, not with {last.kind}")
    return last.vocab_size
