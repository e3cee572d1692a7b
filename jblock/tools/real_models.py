"""Shapes of real models, without weights: what the compile matrix compiles."""

import collections
import dataclasses

from jblock.blocks.spec import (
    AttentionSpec,
    ComponentSpec,
    EmbeddingSpec,
    ExpertSpec,
    FfnSpec,
    NormSpec,
    RopeSpec,
    RouterSpec,
    UnembeddingSpec,
)
from jblock.engine.signature import Signature
from jblock.parallel.rules import ShardingRules

Layer = tuple[ComponentSpec, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model by its components.

    Attributes:
      name: as in the compile matrix.
      embedding: its embedding.
      layers: components of every layer, in order; the first of each is its attention.
      norm: the final norm.
      unembedding: its unembedding.
      tied: the head reads the embedding table.
    """

    name: str
    embedding: EmbeddingSpec
    layers: tuple[Layer, ...]
    norm: NormSpec
    unembedding: UnembeddingSpec
    tied: bool = False

    @property
    def attention(self) -> AttentionSpec:
        """An attention of it; all have one KV shape."""
        return next(s for s in self.layers[0] if isinstance(s, AttentionSpec))

    def ends(self, dtype: str, sharding: ShardingRules) -> tuple[Signature, Signature]:
        """Signatures of its embedding and of its head."""
        return (
            _signature((self.embedding,), dtype, sharding),
            _signature(
                (self.norm, self.unembedding),
                dtype,
                sharding,
                tied=self.tied and dtype == "float32",
            ),
        )

    def layer_signatures(self, dtype: str, sharding: ShardingRules) -> dict[Signature, int]:
        """Signature of every form of layer -> how many layers have it."""
        forms = collections.Counter(self.layers)
        return {_signature(specs, dtype, sharding): count for specs, count in forms.items()}

    def pair(self, dtype: str, sharding: ShardingRules) -> tuple[Signature, ...]:
        """Signatures of the last two layers: a segment."""
        return tuple(_signature(specs, dtype, sharding) for specs in self.layers[-2:])


def _signature(
    specs: Layer, dtype: str, sharding: ShardingRules, *, tied: bool = False
) -> Signature:
    forms = (None,) * len(specs)
    return Signature(specs=specs, forms=forms, dtype=dtype, tied=tied, sharding=sharding)


def _llama(
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
    experts: int = 0,
) -> Model:
    """A model of Llama's form, or of Mixtral's where there are experts, two of them for each token."""
    attention = AttentionSpec(
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        norm_eps=1e-5,
        rope=RopeSpec(theta=theta),
        qk_norm=qk_norm,
    )
    layer: Layer = (
        attention,
        FfnSpec(hidden_size=hidden, intermediate_size=ffn, norm_eps=1e-5),
    )
    if experts:
        router = RouterSpec(
            hidden_size=hidden, num_experts=experts, top_k=2, norm_eps=1e-5, normalize=True
        )
        expert = ExpertSpec(hidden_size=hidden, intermediate_size=ffn)
        layer = (attention, router, *(expert,) * experts)
    return Model(
        name=name,
        embedding=EmbeddingSpec(vocab_size=vocab, hidden_size=hidden),
        layers=(layer,) * layers,
        norm=NormSpec(hidden_size=hidden, eps=1e-5),
        unembedding=UnembeddingSpec(vocab_size=vocab, hidden_size=hidden),
        tied=tied,
    )


def _gemma3_27b() -> Model:
    """Every sixth layer sees all, the others 1024 tokens; its scores are scaled by 1 / sqrt(168)."""
    hidden, vocab, norm = 5376, 262208, "rms_plus_one"

    def layer(index: int) -> Layer:
        full = index % 6 == 5
        rope = RopeSpec(kind="linear", theta=1e6, factor=8.0) if full else RopeSpec(theta=1e4)
        attention = AttentionSpec(
            hidden_size=hidden,
            num_heads=32,
            num_kv_heads=16,
            head_dim=128,
            norm_eps=1e-6,
            rope=rope,
            qk_norm=True,
            sliding_window=None if full else 1024,
            norm=norm,
            post_norm=True,
            scale=168**-0.5,
        )
        ffn = FfnSpec(
            hidden_size=hidden,
            intermediate_size=21504,
            norm_eps=1e-6,
            activation="gelu_tanh",
            norm=norm,
            post_norm=True,
        )
        return attention, ffn

    return Model(
        name="gemma3-27b",
        embedding=EmbeddingSpec(vocab_size=vocab, hidden_size=hidden, scale=hidden**0.5),
        layers=tuple(layer(i) for i in range(62)),
        norm=NormSpec(hidden_size=hidden, eps=1e-6, norm=norm),
        unembedding=UnembeddingSpec(vocab_size=vocab, hidden_size=hidden),
        tied=True,
    )


MODELS = {
    m.name: m
    for m in (
        _llama("demo-1m", 128, 384, layers=4, heads=4, kv=2, head_dim=32, vocab=1024, tied=True),
        _llama("demo-3m", 192, 576, layers=6, heads=6, kv=2, head_dim=32, vocab=1024),
        _llama(
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
        _llama("llama3-8b", 4096, 14336, layers=32, heads=32, kv=8, vocab=128256),
        _gemma3_27b(),
        _llama("qwen3-32b", 5120, 25600, layers=64, heads=64, kv=8, vocab=151936, qk_norm=True),
        _llama("mixtral-8x7b", 4096, 14336, layers=32, heads=32, kv=8, vocab=32000, experts=8),
        _llama("llama3-70b", 8192, 28672, layers=80, heads=64, kv=8, vocab=128256),
    )
}
