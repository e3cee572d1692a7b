"""What the KV cache knows of one sequence."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jblock.engine.kv_cache.host_offload import HostCopy
from jblock.engine.kv_cache.spec import KVShape, PageShape, RowShape

LayerDigests = Mapping[KVShape, tuple[bytes, ...]]
"""For each KV shape of a chain, the digests of its attentions of that shape, in order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Boundary:
    """A place in a chain from which on other served chains have other layers. Rows that arrive there are
    cached, so that a prompt which one of those chains has had begins here.

    Attributes:
      stage: index of the stage of its route that it lies in.
      layer: index of the layer of that stage that it lies in front of.
      shape: of the pages that hold its rows.
      digest: names what decided the rows: the components and deltas below.
      below: of each KV shape, how many attentions the chain has below.
    """

    stage: int
    layer: int
    shape: RowShape
    digest: bytes
    below: Mapping[KVShape, int]


class Entry(NamedTuple):
    """Where the next tokens of a prompt enter their chain.

    Attributes:
      until: the first token that does not enter here.
      number: of the boundary, among those of the chain.
    """

    until: int
    number: int


@dataclasses.dataclass(eq=False)
class SequencePages:
    """The pages of one sequence: as many in each of its attention layers.

    Attributes:
      layers: digests of its attention layers, by KV shape.
      plain: those of the pages before an activated LoRA acts, which are its base's; None without one.
      plain_until: of so many first tokens.
      salt: of its tenant.
      slot: its row in the page tables; -1 without pages.
      count: pages in each layer.
      hashes: of the tokens up to the end of each full page, as far as worked out.
      cached: how many of its pages others can find by content.
      boundaries: of its chain, the lowest first.
      entries: where tokens enter whose trunk was found, behind those that need no computing; ascending.
      host_copy: its pages in host memory, while it waits after a preemption by offload.
    """

    layers: LayerDigests
    salt: str
    slot: int = -1
    count: int = 0
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    cached: int = 0
    host_copy: HostCopy | None = None
    boundaries: Sequence[Boundary] = ()
    entries: list[Entry] = dataclasses.field(default_factory=list)
    plain: LayerDigests | None = None
    plain_until: int = 0

    def digests(self, until: int) -> LayerDigests:
        """What names the layers of a page that ends with token `until`, not counting that."""
        return self.plain if self.plain is not None and until <= self.plain_until else self.layers

    def uses(self, shape: PageShape) -> bool:
        """Whether it may hold pages of a shape."""
        return shape in self.layers or any(b.shape == shape for b in self.boundaries)

    def entry(self, token: int) -> Entry | None:
        """Where a token enters its chain; None: at the embedding."""
        return next((entry for entry in self.entries if token < entry.until), None)
