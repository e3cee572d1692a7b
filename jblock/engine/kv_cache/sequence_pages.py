"""What the KV cache knows of one sequence."""

import dataclasses
from collections.abc import Mapping

from jblock.engine.kv_cache.host_offload import HostCopy
from jblock.engine.kv_cache.spec import KVShape

LayerDigests = Mapping[KVShape, tuple[bytes, ...]]
"""For each KV shape of a chain, the digests of its attentions of that shape, in order."""


@dataclasses.dataclass(eq=False)
class SequencePages:
    """The pages of one sequence: as many in each of its attention layers.

    Attributes:
      layers: digests of its attention layers, by KV shape.
      salt: of its tenant.
      slot: its row in the page tables; -1 without pages.
      count: pages in each layer.
      hashes: of the tokens up to the end of each full page, as far as worked out.
      cached: how many of its pages others can find by content.
      host_copy: its pages in host memory, while it waits after a preemption by offload.
    """

    layers: LayerDigests
    salt: str
    slot: int = -1
    count: int = 0
    hashes: list[bytes] = dataclasses.field(default_factory=list)
    cached: int = 0
    host_copy: HostCopy | None = None
