"""Giving way by copies on the host: accounts, contents, privacy, and the same tokens either way."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from harness import Agent, oracle, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jblock.engine.api import Request
from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.host_offload import HostCopy, HostPool, Rates
from jblock.engine.kv_cache.manager import KVCacheManager
from jblock.engine.kv_cache.page_pool import IdAllocator
from jblock.engine.kv_cache.spec import KVShape, PoolShape
from jblock.engine.programs.page_ops import COPY_PAGES
from jblock.engine.runner.rates import measure_rates
from jblock.engine.scheduling.sequence import SequenceState
from jblock.engine.weights.lease import Lease

PAGE, MAX_PAGES, MAX_SEQS = 4, 8, 16
LAYERS = {KVShape(1, 2): 1, KVShape(1, 4): 2}
DIGESTS = {s: tuple(b"%d.%d" % (s.head_dim, i) for i in range(n)) for s, n in LAYERS.items()}
SHAPES = {
    s: PoolShape(num_pages=1 + 7 * n, page_size=PAGE, num_kv_heads=1, head_dim=s.head_dim)
    for s, n in LAYERS.items()
}
HOST_BYTES = 5 * sum(LAYERS[s] * p.page_bytes for s, p in SHAPES.items())
CHAIN = types.SimpleNamespace(invocation=())
ROUTE = types.SimpleNamespace(
    virtual_tokens=0, kv_digests=DIGESTS, plain_digests=None, boundaries=(), chain=CHAIN
)


class Cells:
    """Pages with one number a token, so that what a page holds can be told."""

    def __init__(self):
        self.pages = {g: np.zeros((s.num_pages, PAGE), np.int64) for g, s in SHAPES.items()}

    def zero_pages(self, shape, pages):
        self.pages[shape][list(pages)] = 0

    def copy_out(self, shape, pages):
        return [self.pages[shape][list(pages)].copy()]

    def copy_in(self, shape, pages, copies, skip=0):
        self.pages[shape][list(pages[skip:])] = copies[0][skip : len(pages)]


class KvMachine(RuleBasedStateMachine):
    """Random lives of sequences of two tenants. The cell of a token holds a hash of its tenant and all
    tokens so far: a page of anyone else's, or of other tokens, cannot pass for it."""

    def __init__(self):
        super().__init__()
        self.cells = Cells()
        self.kv = KVCacheManager(
            SHAPES, PAGE, MAX_SEQS, MAX_PAGES, self.cells, HostPool(HOST_BYTES, HOST_BYTES)
        )
        self.slots = IdAllocator(MAX_SEQS)
        self.running: list[SequenceState] = []
        self.waiting: list[SequenceState] = []

    def expected(self, sequence: SequenceState, position: int) -> int:
        return hash((sequence.request.cache_salt, sequence.all_token_ids[: position + 1])) | 1

    def compute(self, sequence: SequenceState) -> None:
        """Writes what admission left to compute, as a prefill would."""
        for position in range(sequence.computed, len(sequence.all_token_ids)):
            for shape, layers in LAYERS.items():
                pages = self.kv.tables[shape][:layers, sequence.pages.slot, position // PAGE]
                self.cells.pages[shape][pages, position % PAGE] = self.expected(sequence, position)
        sequence.computed = len(sequence.all_token_ids)
        self.kv.cache(sequence.pages, sequence.all_token_ids, sequence.computed)

    def admit(self, sequence: SequenceState) -> bool:
        pages, tokens, limit = sequence.pages, sequence.all_token_ids, sequence.shareable_tokens
        if not self.slots.num_free or self.kv.prefix_in_flight(pages, tokens, limit):
            return False
        (slot,) = self.slots.allocate(1)
        computed = self.kv.admit(pages, slot, tokens, limit)
        if computed is None:
            self.slots.free([slot])
            return False
        sequence.computed = computed
        self.compute(sequence)
        self.running.append(sequence)
        return True

    def release(self, sequence: SequenceState) -> None:
        self.slots.free([sequence.pages.slot])
        self.kv.release(sequence.pages)

    @rule(salt=st.sampled_from("ab"), length=st.integers(1, 3 * PAGE), first=st.integers(0, 1))
    def submit(self, salt, length, first):
        request = Request(
            request_id="r", model="m", token_ids=(first, *range(length - 1)), cache_salt=salt
        )
        sequence = SequenceState(
            request=request, route=ROUTE, max_tokens=99, seed=0, lease=Lease(ROUTE)
        )
        if not self.admit(sequence):
            self.waiting.append(sequence)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 99), count=st.integers(1, 5))
    def generate(self, index, count):
        sequence = self.running[index % len(self.running)]
        for _ in range(count):
            if len(sequence.all_token_ids) < 6 * PAGE and self.kv.grow(
                sequence.pages, len(sequence.all_token_ids) + 1
            ):
                sequence.generated.append(len(sequence.generated))
                self.compute(sequence)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 99), swap=st.booleans(), short=st.integers(0, 3))
    def preempt(self, index, swap, short):
        sequence = self.running.pop(index % len(self.running))
        written = max(len(sequence.all_token_ids) - short, 0)
        used = self.kv.host.used
        if swap:
            room = self.kv.host.fits(self.kv.copy_bytes(sequence.pages, written))
            assert self.kv.offload(sequence.pages, written) == (room and written > 0)
        if sequence.pages.host_copy is None:
            assert self.kv.host.used == used
        self.release(sequence)
        sequence.computed = 0
        self.waiting.append(sequence)

    @precondition(lambda self: self.waiting)
    @rule(index=st.integers(0, 99))
    def resume(self, index):
        sequence = self.waiting.pop(index % len(self.waiting))
        held = sequence.pages.host_copy.tokens if sequence.pages.host_copy else 0
        if not self.admit(sequence):
            assert (sequence.pages.host_copy.tokens if sequence.pages.host_copy else 0) == held
            self.waiting.append(sequence)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 99))
    def finish(self, index):
        self.release(self.running.pop(index % len(self.running)))

    @precondition(lambda self: self.waiting)
    @rule(index=st.integers(0, 99))
    def cancel(self, index):
        self.kv.drop_copy(self.waiting.pop(index % len(self.waiting)).pages)

    @rule()
    def land(self):
        self.kv.host.land()

    @invariant()
    def accounts_balance(self):
        held = sum(s.pages.host_copy.num_bytes for s in self.waiting if s.pages.host_copy)
        assert self.kv.host.used == held <= HOST_BYTES
        assert not any(s.pages.host_copy for s in self.running)
        for shape, pool in self.kv.pools.items():
            table = self.kv.tables.table(shape, LAYERS[shape])
            owned = {int(p) for s in self.running for p in table[:, s.pages.slot].flat} - {0}
            assert pool.num_free == pool.total - len(owned)

    @invariant()
    def everyone_reads_what_is_theirs_and_nothing_else(self):
        for sequence in self.running:
            length = len(sequence.all_token_ids)
            wanted = [self.expected(sequence, i) for i in range(length)]
            pages = sequence.pages
            for shape, layers in LAYERS.items():
                for ids in self.kv.tables[shape][:layers, pages.slot, : pages.count]:
                    cells = self.cells.pages[shape][ids].reshape(-1).tolist()
                    assert cells[:length] == wanted
                    assert not any(cells[length:])


TestKvMachine = KvMachine.TestCase
TestKvMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_host_is_bounded_and_so_is_what_is_on_its_way():
    pool = HostPool(10, 4)
    first, second = HostCopy(1, {}, 3), HostCopy(1, {}, 3)
    assert pool.fits(4) and not pool.fits(5)
    pool.keep(first)
    assert not pool.fits(3)  # 6 would be on their way
    pool.land()
    assert not pool.fits(3)  # a step later at the earliest
    pool.land()
    pool.keep(second)
    assert pool.used == 6 and pool.fits(1) and not pool.fits(3)
    pool.drop(second)
    assert pool.used == 3 and pool.fits(4)
    pool.drop(first)
    assert pool.used == 0
    with pytest.raises(ValueError, match="-1"):
        HostPool(-1, 0)


def test_the_cheaper_way_is_taken():
    rates = Rates(copy_bytes=1000.0, prefill_tokens=10.0)
    assert rates.offload_pays(num_bytes=499, num_tokens=10)
    assert not rates.offload_pays(num_bytes=501, num_tokens=10)


BASE, ADAPTER = "llama_gqa_untied", "lora_all_r8"
CONFIG = EngineConfig(
    max_num_seqs=8,
    max_model_len=96,
    page_size=16,
    decode_sizes=(8,),
    prefill_grids=((8, 16),),
    kv_memory_mb=1,
)
PROMPTS = {
    f"r{i}": (model, oracle(model)["prompt"][i : i + 20 + i])
    for i in range(12)
    for model in (BASE if i % 2 else ADAPTER,)
}
ALWAYS, NEVER = (Rates(copy_bytes=c, prefill_tokens=1.0) for c in (1e18, 1e-9))


def logits_of(agent: Agent) -> dict[tuple[str, int], np.ndarray]:
    """Logits by request and position; the device keeps them as they were sampled from."""
    return {
        (item.sequence.request.request_id, item.start + item.q_len): logits[i]
        for batch, logits in agent.device.seen
        for i, item in enumerate(batch.items)
        if item.samples
    }


@pytest.mark.parametrize(
    "kv_dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long), "int8"]
)
def test_both_ways_give_the_tokens_of_an_unloaded_run(zoo, kv_dtype):
    config = dataclasses.replace(CONFIG, kv_dtype=kv_dtype)
    roomy = Agent.make(zoo, [BASE, ADAPTER], config)
    expected = roomy.generate(PROMPTS, max_tokens=40)
    assert roomy.loop.stats().preemptions == 0
    tight = dataclasses.replace(config, kv_pages=13)
    for rates in (ALWAYS, NEVER):
        agent = Agent.make(zoo, [BASE, ADAPTER], tight)
        agent.device.rates = rates
        assert agent.generate(PROMPTS, max_tokens=40) == expected
        stats = agent.loop.stats()
        assert stats.preemptions > 0 and stats.pages_free == stats.pages_total
        assert stats.kv_offloads == (stats.preemptions if rates is ALWAYS else 0)
        assert stats.host_kv_bytes == 0
        if rates is ALWAYS:
            # Nothing was computed twice, and every number is the one an unloaded run computes.
            assert stats.prompt_tokens - stats.preemptions <= roomy.loop.stats().prompt_tokens
            wanted = logits_of(roomy)
            for key, logits in logits_of(agent).items():
                np.testing.assert_array_equal(logits, wanted[key], err_msg=str(key))


def test_a_full_host_computes_anew(zoo):
    agent = Agent.make(zoo, [BASE], dataclasses.replace(CONFIG, kv_pages=13))
    agent.device.rates = ALWAYS
    agent.loop.kv.host.total = agent.device.longest_bytes(agent.graph) // 2
    prompts = {i: (BASE, prompt) for i, (_, prompt) in PROMPTS.items()}
    roomy = Agent.make(zoo, [BASE], CONFIG)
    assert agent.generate(prompts, max_tokens=40) == roomy.generate(prompts, max_tokens=40)
    stats = agent.loop.stats()
    assert 0 < stats.kv_offloads < stats.preemptions and stats.host_kv_bytes == 0


def test_a_cancelled_sequence_leaves_nothing_on_the_host(zoo):
    agent = Agent.make(zoo, [BASE], dataclasses.replace(CONFIG, kv_pages=8))
    agent.device.rates = ALWAYS
    for i in range(3):
        agent.loop.submit(request(f"r{i}", BASE, oracle(BASE)["prompt"][i : i + 30]))
    while not agent.loop.stats().host_kv_bytes:
        agent.loop.step()
    for i in range(3):
        agent.loop.cancel(f"r{i}")
    assert agent.loop.stats().host_kv_bytes == 0


def test_copies_hold_their_own_pages_only_and_overwrite_whole_ones(zoo):
    state = Agent.make(zoo, [BASE], CONFIG).device.state
    ((shape, pool),) = state.pool_shapes.items()
    rng = np.random.default_rng(0)
    before = [rng.standard_normal(a.shape).astype(np.float32) for a in pool.abstract_arrays()]
    for array in before:
        array[0] = 0
    state.pools[shape] = tuple(jax.numpy.asarray(a) for a in before)
    pages = [3, 7, 4, 2, *range(10, 10 + COPY_PAGES - 4), 9]
    copies = jax.tree.map(np.asarray, state.copy_out(shape, pages))
    assert len(copies) == 2
    for copy, array in zip(copies[1], before, strict=True):
        np.testing.assert_array_equal(copy[0], array[9])
        assert not copy[1:].any()  # padding is the null page, nobody's
    state.copy_in(shape, [5, 6, 100, 101], [copies[0]], skip=1)
    for now, array in zip(map(np.asarray, state.pools[shape]), before, strict=True):
        np.testing.assert_array_equal(now[[5, 6, 100, 101]], array[[5, 7, 4, 2]])
        others = [i for i in range(1, len(array)) if i not in (6, 100, 101)]
        np.testing.assert_array_equal(now[others], array[others])


def test_rates_are_measured_and_leave_no_trace(zoo):
    agent = Agent.make(zoo, [BASE], CONFIG)
    agent.device.rates = measure_rates(agent.device, agent.graph)
    assert agent.device.rates.copy_bytes > 1e4 and agent.device.rates.prefill_tokens > 1
    for arrays in agent.device.state.pools.values():
        assert not any(np.asarray(a).any() for a in arrays)
    got = agent.generate({"r": (BASE, oracle(BASE)["prompt"])})
    assert got["r"] == oracle(BASE)["greedy"][:16].tolist()
