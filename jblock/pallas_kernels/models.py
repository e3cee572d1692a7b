"""Projections of real models, for the compile matrix, the benchmarks and the traffic counts of matmuls."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What a matmul needs to know of a model.

    Attributes:
      name: of the model.
      hidden: its hidden size.
      inner: width of a feed-forward, of one expert where there are several.
      query, kv: widths of all query and of all key heads.
      experts: of a layer; 0: none.
      top_k: experts of a token.
    """

    name: str
    hidden: int
    inner: int
    query: int
    kv: int
    experts: int = 0
    top_k: int = 0

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """(inputs, outputs) of each kind of projection."""
        return {
            "q": (self.hidden, self.query),
            "k": (self.hidden, self.kv),
            "o": (self.query, self.hidden),
            "up": (self.hidden, self.inner),
            "down": (self.inner, self.hidden),
        }


MODELS = (
    Model(name="llama-3-8b", hidden=4096, inner=14336, query=4096, kv=1024),
    Model(name="llama-3-70b", hidden=8192, inner=28672, query=8192, kv=1024),
    Model(name="qwen3-0.6b", hidden=1024, inner=3072, query=2048, kv=1024),
    Model(name="qwen3-32b", hidden=5120, inner=25600, query=8192, kv=1024),
    Model(name="gemma-3-27b", hidden=5376, inner=21504, query=4096, kv=2048),
    Model(name="mixtral-8x7b", hidden=4096, inner=14336, query=4096, kv=1024, experts=8, top_k=2),
    Model(name="qwen3-30b-a3b", hidden=2048, inner=768, query=4096, kv=512, experts=128, top_k=8),
    Model(name="demo", hidden=128, inner=384, query=128, kv=64),
)


Batches = Callable[[Model], Iterable[tuple[str, tuple[Any, ...]]]]
"""Of a model: a name and what an op's `shapes.program` takes after the model, for each batch."""


def programs(
    op: str,
    program: Callable[..., tuple[Callable, tuple]],
    batches: Batches,
    backend: str,
    models: Iterable[Model] = MODELS,
    **options: Any,
) -> Iterator[tuple[str, Callable, tuple]]:
    """Every program the compile matrix holds a backend of a matmul to.

    Args:
      op: its name.
      program: of its `shapes`.
      batches: of its `shapes`.
      backend: one of backends.BACKENDS.
      models: which.
      options: passed to the op, such as device_kind where no device is present.

    Yields:
      name, function, abstract arguments.
    """
    for model in models:
        for name, batch in batches(model):
            fn, args = program(backend, model, *batch, **options)
            yield f"{op} {model.name} {name}", fn, args
