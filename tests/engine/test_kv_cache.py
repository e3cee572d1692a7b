"""Pages: accounting under any history, prefix reuse by content and salt, and giving way under pressure."""

import dataclasses

import pytest
from harness import Agent, oracle, request
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.page_pool import OutOfPages, PagePool
from jblock.engine.kv_cache.prefix_keys import layer_digests, token_hashes, token_root
from jblock.zoo.records import Step

BASE, ADAPTER, OTHER = "llama_gqa_untied", "lora_all_r8", "llama_bf16"
CONFIG = EngineConfig(
    max_num_seqs=8,
    max_model_len=160,
    page_size=16,
    decode_sizes=(8,),
    prefill_grids=((8, 16),),
    kv_memory_mb=1,
)
COUNT = 10
LAYERS = (b"low", b"high")


class PagePoolMachine(RuleBasedStateMachine):
    """Random histories against a plain model: owners per page, and what each page holds. Leases hold a page
    of each of two layers."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(COUNT)
        self.owners: dict[int, int] = {}
        self.contents: dict[int, tuple[int, bytes]] = {}  # what an owned page was last cached as

    def now(self, pages):
        return [page for page in pages if page in self.owners]

    @rule(target=leases, count=st.integers(0, COUNT // 2 + 1))
    def allocate(self, count):
        count *= 2
        if count > self.pool.num_free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(count)
            return ()
        pages = self.pool.allocate(count)
        for page in pages:
            assert page not in self.owners
            self.owners[page] = 1
            self.contents.pop(page, None)
        return tuple(pages)

    @rule(pages=leases, key=st.integers(0, 5))
    def cache(self, pages, key):
        pages = self.now(pages)[:2]
        if len(pages) == 2:
            for digest, page in zip(LAYERS, pages, strict=True):
                taken = (key, digest) in self.contents.values()
                if page not in self.contents and not taken:
                    self.contents[page] = (key, digest)
            self.pool.cache(bytes([key]), LAYERS, pages)

    @rule(target=leases, key=st.integers(0, 5))
    def share(self, key):
        found = self.pool.lookup(bytes([key]), LAYERS)
        if found is None:
            return ()
        for digest, page in zip(LAYERS, found, strict=True):
            assert self.contents[page] == (key, digest)
            self.owners[page] = self.owners.get(page, 0) + 1
        self.pool.add_owner(found)
        return tuple(found)

    @rule(key=st.integers(0, 5), layers=st.sampled_from([LAYERS, LAYERS[1:]]))
    def invalidate(self, key, layers):
        self.pool.invalidate(bytes([key]), layers)
        for page in [p for p, (k, d) in self.contents.items() if k == key and d in layers]:
            del self.contents[page]
        assert self.pool.lookup(bytes([key]), LAYERS) is None

    @rule(pages=consumes(leases))
    def free(self, pages):
        pages = self.now(pages)
        self.pool.free(pages)
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                del self.owners[page]

    @rule(page=st.integers(1, COUNT))
    def free_wrongly(self, page):
        if page not in self.owners:
            with pytest.raises(ValueError):
                self.pool.free([page])

    @invariant()
    def accounts_balance(self):
        assert self.pool.num_free == COUNT - len(self.owners)
        assert all(1 <= p <= COUNT for p in self.owners)


TestPagePool = PagePoolMachine.TestCase


@given(
    count=st.integers(0, 12),
    owned=st.sets(st.integers(0, 9)),
    cached=st.sets(st.integers(0, 9)),
    most=st.integers(0, 10),
)
def test_a_pool_of_another_size_keeps_what_is_owned_and_found(count, owned, cached, most):
    pool = PagePool(10)
    pages = pool.allocate(10)
    for i in sorted(cached):
        pool.cache(bytes([i]), LAYERS[:1], [pages[i]])
    pool.free([pages[i] for i in range(10) if i not in owned])
    if len(owned) > count:
        with pytest.raises(OutOfPages):
            pool.resize(count, most)
        assert pool.num_free == 10 - len(owned)
        return
    new_id = pool.resize(count, most)
    assert pool.total == count and pool.num_free == count - len(owned)
    moved = [int(new_id[pages[i]]) for i in owned]
    assert 0 not in moved and len(set(moved)) == len(moved) and all(m <= count for m in moved)
    idle = cached - owned
    found = {i for i in cached if pool.lookup(bytes([i]), LAYERS[:1])}
    assert cached & owned <= found
    assert len(found - owned) == min(len(idle), most, count - len(owned))
    for i in found:
        assert pool.lookup(bytes([i]), LAYERS[:1]) == [int(new_id[pages[i]])]
    assert len(pool.allocate(pool.num_free)) == count - len(owned)


def test_keys_name_content_and_salt():
    steps = (Step(component="aa"), Step(component="bb", deltas=("dd",)))
    (low, high) = layer_digests(steps, [0, 1])
    assert low != high and layer_digests(steps, [1]) == [high]
    assert layer_digests((steps[0], Step(component="bb")), [0, 1]) != [low, high]
    assert layer_digests((steps[0], Step(component="bb")), [0]) == [low]
    torn = (Step(component="aa", deltas=("bb",)), Step(component="dd"))
    assert layer_digests(torn, [1]) != [high]
    root = token_root("")
    assert root != token_root("salt")
    keys = token_hashes(root, list(range(40)), 16)
    assert len(keys) == 2 and keys == token_hashes(root, list(range(35)), 16)
    assert token_hashes(keys[0], list(range(16, 32)), 16) == keys[1:]
    assert token_hashes(root, [9, *range(1, 32)], 16)[1] != keys[1]


@pytest.fixture(scope="module")
def agent(zoo) -> Agent:
    return Agent.make(zoo, [BASE, ADAPTER, OTHER], CONFIG)


def hits(agent: Agent, model: str, prompt, salt: str = "", **options) -> tuple[int, list[int]]:
    """(prompt tokens found in the cache, generated tokens) of one request alone."""
    before = agent.loop.stats().cached_tokens
    made = dataclasses.replace(request("r", model, prompt, **options), cache_salt=salt)
    agent.loop.submit(made)
    tokens = [t for o in agent.run()["r"] for t in o.token_ids]
    return agent.loop.stats().cached_tokens - before, tokens


def test_a_prefix_is_computed_once_for_the_same_chain_and_salt_only(agent):
    prompt = oracle(BASE)["prompt"]
    assert hits(agent, BASE, prompt) == (0, oracle(BASE)["greedy"].tolist())
    # 80 tokens are 5 pages; the last token is always computed, so 4 of them count.
    assert hits(agent, BASE, prompt) == (64, oracle(BASE)["greedy"].tolist())
    assert hits(agent, BASE, prompt, salt="tenant")[0] == 0
    assert hits(agent, BASE, prompt, salt="tenant")[0] == 64
    assert hits(agent, ADAPTER, prompt)[0] == 0  # same components, other deltas
    assert hits(agent, OTHER, prompt)[0] == 0
    # What was generated is found too: the conversation's next turn.
    longer = [*prompt.tolist(), *oracle(BASE)["greedy"].tolist()[:20], 9, 9]
    assert hits(agent, BASE, longer, max_tokens=4)[0] == 96


def test_forgotten_when_the_space_is_wanted(zoo):
    config = dataclasses.replace(CONFIG, max_num_seqs=1)
    agent = Agent.make(zoo, [BASE], config)
    pages = agent.loop.stats().pages_total
    prompt = oracle(BASE)["prompt"][:40]
    assert hits(agent, BASE, prompt, max_tokens=1)[0] == 0
    assert hits(agent, BASE, prompt, max_tokens=1)[0] == 32
    for i in range(pages):
        hits(agent, BASE, [i + 5] * 40, max_tokens=1)
    assert hits(agent, BASE, prompt, max_tokens=1)[0] == 0


def test_oversubscribed_sequences_finish_with_the_same_tokens(zoo):
    """Room for a quarter of what is asked for: the youngest give way and are computed anew."""
    config = dataclasses.replace(CONFIG, max_model_len=96)
    prompts = {
        f"r{i}": (model, oracle(model)["prompt"][i : i + 20 + i])
        for i in range(16)
        for model in (BASE if i % 2 else ADAPTER,)
    }
    roomy = Agent.make(zoo, [BASE, ADAPTER], config)
    expected = roomy.generate(prompts, max_tokens=45)
    assert roomy.loop.stats().preemptions == 0
    tight = Agent.make(zoo, [BASE, ADAPTER], dataclasses.replace(config, kv_pages=13))
    assert tight.loop.stats().pages_total == 13 * sum(tight.graph.kv_layers.values())
    got = tight.generate(prompts, max_tokens=45)
    stats = tight.loop.stats()
    assert stats.preemptions > 0 and stats.pages_free == stats.pages_total
    assert got == expected
