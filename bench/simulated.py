"""An engine's scheduler and KV manager, as they are, in front of a device of which only the time is real."""

import dataclasses
import types
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.spec import KVShape, PoolShape
from jblock.engine.scheduling.deadlines import set_deadline
from jblock.engine.scheduling.machine import Machine
from jblock.engine.scheduling.scheduler import Scheduler
from jblock.engine.scheduling.sequence import SequenceState, WorkItem
from jblock.engine.scheduling.step_budget import Times

_SHAPE = KVShape(1, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """What a profile would say of one chain, frozen.

    Attributes:
      decode: seconds of a decode step by rows.
      chunks: seconds of a chunk of a prompt by its length.
    """

    decode: Times
    chunks: Mapping[int, float]

    @property
    def token_seconds(self) -> float:
        """Of one decoded token in a batch of a good size."""
        return self.decode.of(self.decode.efficient) / self.decode.efficient

    def machine(self) -> Machine:
        """As the scheduler asks."""
        return Machine(
            greedy_only=False,
            rates=None,
            chunks=sorted(self.chunks),
            chunk_seconds=lambda route, chunk, boundary=None: self.chunks.get(
                chunk, self.decode.seconds[0]
            ),
            token_seconds=lambda route: self.token_seconds,
        )


class _Store:
    """Pages without content."""

    def zero_pages(self, shape: KVShape, pages: Sequence[int]) -> None:
        pass

    def copy_out(self, shape: KVShape, pages: Sequence[int]) -> Sequence[Any]:
        return ()

    def copy_in(
        self, shape: KVShape, pages: Sequence[int], copies: Sequence[Any], skip: int = 0
    ) -> None:
        pass


class SimulatedEngine:
    """One chain with one attention. Time passes by the costs of what is scheduled.

    Attributes:
      now: seconds since the start.
      scheduler: the engine's own.
      machine: what it runs on.
      served: (request, seconds, tokens) of work done for the first time is told to it.
    """

    def __init__(
        self,
        costs: Costs,
        *,
        kv_tokens: int,
        max_num_seqs: int = 64,
        page_size: int = 4,
        served: Callable[[Request, float, int], None] = lambda request, seconds, tokens: None,
    ):
        config = EngineConfig(max_num_seqs=max_num_seqs, page_size=page_size)
        self.now = 0.0
        self.served = served
        self.machine = costs.machine()
        self._costs = costs
        pool = PoolShape(
            num_pages=1 + kv_tokens // page_size, page_size=page_size, num_kv_heads=1, head_dim=64
        )
        kv = KVCacheManager({_SHAPE: pool}, page_size, max_num_seqs, config.max_pages, _Store())
        rows = 4 * max(costs.chunks)
        self.scheduler = Scheduler(config, kv, max_num_seqs + rows, lambda item: None)
        self._chain = types.SimpleNamespace(name="sim", eos_token_ids=(), invocation=())
        self._route: Any = types.SimpleNamespace(
            virtual_tokens=0,
            kv_digests={_SHAPE: (b"0",)},
            plain_digests=None,
            boundaries=(),
            chain=self._chain,
        )
        self._lease: Any = types.SimpleNamespace(ready=True, slot=0, error="")
        self._done: dict[str, int] = {}

    def submit(self, request: Request) -> None:
        """Queues a request, which runs to its length."""
        sequence = SequenceState(
            request=request,
            route=self._route,
            max_tokens=request.sampling.max_tokens,
            seed=0,
            lease=self._lease,
        )
        set_deadline(sequence, self.machine, self.scheduler.kv)
        self.scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends a request."""
        sequence = self.scheduler.find(request_id)
        if sequence is not None:
            self.scheduler.end(sequence, poisoned=False)

    def step(self) -> list[str]:
        """One step, of which time passes; the ids of those whose next token it brought."""
        self.scheduler.admit(self.machine)
        items = self.scheduler.schedule(self.machine, max(self._costs.chunks.values()))
        rows = sum(item.chunk == 1 for item in items)
        seconds = self._costs.decode.of(rows) if rows else 0.0
        seconds += sum(self._costs.chunks[item.chunk] for item in items if item.chunk > 1)
        self.now += seconds
        return [item.sequence.request.request_id for item in items if self._complete(item)]

    def _complete(self, item: WorkItem) -> bool:
        """What the device has done; whether it was a token."""
        sequence, end = item.sequence, item.start + item.q_len
        request = sequence.request
        sequence.item = None
        self.scheduler.rows.free(item.rows[1:])
        before = self._done.get(request.request_id, 0)
        new = end - max(item.start, before)
        if new > 0:
            self._done[request.request_id] = end
            whole = self._costs.chunks.get(item.chunk, self._costs.token_seconds)
            self.served(request, whole * new / item.q_len, new)
        kv = self.scheduler.kv
        if item.of_prompt and kv.has_uncached(sequence.pages, end):
            kv.cache(sequence.pages, sequence.all_token_ids, end)
        if not item.samples:
            return False
        sequence.generated.append(1)
        if len(sequence.generated) >= sequence.max_tokens:
            self._done.pop(request.request_id, None)
            self.scheduler.end(sequence, poisoned=False)
        return True


def request(
    request_id: str,
    tenant: str,
    prompt: int | Sequence[int],
    output: int,
    weight: float = 1.0,
    **fields: Any,
) -> Request:
    """A request of a tenant; a prompt that is given by its length has a beginning of its own."""
    ids = (
        tuple(prompt)
        if not isinstance(prompt, int)
        else (zlib.crc32(request_id.encode()) >> 1, *(1,) * (prompt - 1))
    )
    return Request(
        request_id=request_id,
        model="sim",
        token_ids=ids,
        sampling=SamplingParams(max_tokens=output, ignore_eos=True),
        tenant=tenant,
        weight=weight,
        cache_salt=tenant,
        **fields,
    )
