"""What decides the program of a block: its form without its weights."""

import dataclasses

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    NormSpec,
    RouterSpec,
    StitchSpec,
    UnembeddingSpec,
)
from jblock.blocks.spec_json import canonical_json, spec_to_json
from jblock.parallel.rules import ONE_DEVICE, ShardingRules

# Pieces of the longest delta that is served: rank 512, or as many virtual tokens.
MAX_TURNS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableForm:
    """Shape of the slot tables of one component (blocks/slots.py).

    Attributes:
      targets: what has tables, sorted: projections with LoRA ("q"; "weight" of an embedding or
        unembedding), vectors ("q.bias", "q.scale", "norm.weight"), "prompt", "prefix", ways to
        compute bottlenecks ("bottleneck.sum.relu"), codes of few bits ("q.bits2").
      slots: slots of deltas, slot 0 (none) included.
      pieces: pieces of PIECE_RANK rows a table holds, piece 0 (zeros) included.
      places: entries of tables of few bits, entry 0 (none) included; 0 where there are no such tables.
    """

    targets: tuple[str, ...]
    slots: int
    pieces: int
    places: int = 0

    @property
    def turns(self) -> int:
        """Most pieces of one slot."""
        return min(MAX_TURNS, self.pieces - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """Everything that decides the XLA program of a unit of serving, apart from its bucket.

    Attributes:
      specs: the components it runs, in order: an embedding; an attention and/or what follows it (an
        ffn, or a router and its experts); a stitch; or a norm with its unembedding.
      forms: for each component the form of its slot tables, or None.
      dtype: dtype of the matmul weights.
      tied: the unembedding reads the embedding's own table.
      sharding: how its tensors are split over devices.
    """

    specs: tuple[ComponentSpec, ...]
    forms: tuple[TableForm | None, ...]
    dtype: str
    tied: bool = False
    sharding: ShardingRules = ONE_DEVICE

    @property
    def kind(self) -> str:
        """ "embedding", "layer", "stitch" or "head"."""
        first = self.specs[0]
        if isinstance(first, StitchSpec):
            return "stitch"
        if isinstance(first, EmbeddingSpec):
            return "embedding"
        if isinstance(first, (NormSpec, UnembeddingSpec)):
            return "head"
        return "layer"

    @property
    def hidden_size(self) -> int:
        """Width of the register it reads, and but for a stitch also writes."""
        return self.specs[0].hidden_size

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the registers it takes: the one it reads first, the one it writes last."""
        first = self.specs[0]
        if isinstance(first, StitchSpec) and first.output_size != first.hidden_size:
            return first.hidden_size, first.output_size
        return (first.hidden_size,)

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """The attention components, one KV layer each."""
        return tuple(s for s in self.specs if isinstance(s, AttentionSpec))

    @property
    def name(self) -> str:
        """Short name for traces and logs, such as "layer_d256_deltas"."""
        parts = [self.kind, f"d{self.hidden_size}"]
        first, last = self.specs[0], self.specs[-1]
        if self.kind == "layer" and (first is last or not self.attentions):
            parts[0] = "mixture" if first.kind == "router" else first.kind
        return "_".join(parts + (["deltas"] if any(self.forms) else []))

    @property
    def arguments(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the components whose tensors each argument of the program holds: one each, but one of
        every part of the experts where those lie on devices of their own.

        Raises:
          ValueError: experts that cannot be dealt out evenly.
        """
        ways = self.sharding.ways("experts")
        out: list[tuple[int, ...]] = []
        at = 0
        while at < len(self.specs):
            spec = self.specs[at]
            out.append((at,))
            at += 1
            if ways > 1 and isinstance(spec, RouterSpec):
                if spec.num_experts % ways:
                    raise ValueError(
                        f"a mixture of {spec.num_experts} experts does not divide over mesh "
                        f"{self.sharding.mesh}: give an ep that divides it, or tp instead"
                    )
                experts = range(at, at + spec.num_experts)
                if len({self.specs[i] for i in experts}) > 1 or any(self.forms[i] for i in experts):
                    raise ValueError(
                        f"experts of different forms or with adapters are not dealt out over mesh "
                        f"{self.sharding.mesh}: use tp instead of ep"
                    )
                local = spec.num_experts // ways
                out.extend(tuple(experts)[i::local] for i in range(local))
                at += spec.num_experts
        return tuple(out)

    def key(self) -> str:
        """Canonical text: equal exactly when the programs are."""
        return canonical_json(
            {
                "specs": [spec_to_json(s) for s in self.specs],
                "forms": [dataclasses.asdict(f) if f else None for f in self.forms],
                "dtype": self.dtype,
                "tied": self.tied,
                "sharding": str(self.sharding),
            }
        )
