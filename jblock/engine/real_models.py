"""Shapes of real models, without weights: what the compile matrix compiles."""

import dataclasses

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    RopeSpec,
    UnembeddingSpec,
)
from jblock.engine.signature import Signature
from jblock.parallel.rules import ShardingRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model by its components.

    Attributes:
      name: as in the compile matrix.
      vocab: rows of its embedding table.
      attention: of every layer.
      ffn: of every layer.
      layers: how many.
      tied: the head reads the embedding table.
    """

    name: str
    vocab: int
    attention: AttentionSpec
    ffn: FfnSpec
    layers: int
    tied: bool = False

    def signatures(self, dtype: str, sharding: ShardingRules) -> tuple[Signature, ...]:
        """Signatures of its embedding, of a layer and of its head."""
        d = self.attention.hidden_size

        def signature(*specs: ComponentSpec, tied: bool = False) -> Signature:
            forms = (None,) * len(specs)
            return Signature(specs=specs, forms=forms, dtype=dtype, tied=tied, sharding=sharding)

        return (
            signature(EmbeddingSpec(vocab_size=self.vocab, hidden_size=d)),
            signature(self.attention, self.ffn),
            signature(
                NormSpec(hidden_size=d, eps=self.attention.norm_eps),
                UnembeddingSpec(vocab_size=self.vocab, hidden_size=d),
                tied=self.tied and dtype == "float32",
            ),
        )


def _model(
    name: str,
    hidden: int,
    ffn: int,
    *,
    layers: int,
    heads: int,
    kv: int,
    vocab: int,
    head_dim: int = 128,
    tied: bool = False,
    qk_norm: bool = False,
    theta: float = 500000.0,
) -> Model:
    return Model(
        name=name,
        vocab=vocab,
        attention=AttentionSpec(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv,
            head_dim=head_dim,
            norm_eps=1e-5,
            rope=RopeSpec(theta=theta),
            qk_norm=qk_norm,
        ),
        ffn=FfnSpec(hidden_size=hidden, intermediate_size=ffn, norm_eps=1e-5),
        layers=layers,
        tied=tied,
    )


MODELS = {
    m.name: m
    for m in (
        _model("demo-1m", 128, 384, layers=4, heads=4, kv=2, head_dim=32, vocab=1024, tied=True),
        _model("demo-3m", 192, 576, layers=6, heads=6, kv=2, head_dim=32, vocab=1024),
        _model(
            "qwen3-0.6b",
            1024,
            3072,
            layers=28,
            heads=16,
            kv=8,
            vocab=151936,
            tied=True,
            qk_norm=True,
        ),
        _model("llama3-8b", 4096, 14336, layers=32, heads=32, kv=8, vocab=128256),
        _model("qwen3-32b", 5120, 25600, layers=64, heads=64, kv=8, vocab=151936, qk_norm=True),
        _model("llama3-70b", 8192, 28672, layers=80, heads=64, kv=8, vocab=128256),
    )
}
