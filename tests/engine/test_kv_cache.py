"""Pages: accounting under any history, prefix reuse by content and salt, and giving way under pressure."""

import dataclasses

import pytest
from harness import Agent, oracle, request
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.page_pool import OutOfPages, PagePool
from jblock.engine.kv_cache.prefix_keys import page_keys, root_key
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
COUNT, FIRST = 10, 1


class PagePoolMachine(RuleBasedStateMachine):
    """Random histories against a plain model: owners per page, and what each page holds."""

    leases = Bundle("leases")

    def __init__(self):
        super().__init__()
        self.pool = PagePool(COUNT, FIRST)
        self.owners: dict[int, int] = {}
        self.contents: dict[int, bytes] = {}  # what was last remembered of a page while owned

    @rule(target=leases, count=st.integers(0, COUNT + 1))
    def take(self, count):
        if count > self.pool.free:
            with pytest.raises(OutOfPages):
                self.pool.take(count)
            return []
        pages = self.pool.take(count)
        for page in pages:
            assert page not in self.owners
            self.owners[page] = 1
            self.contents.pop(page, None)
        return pages

    @rule(pages=leases, key=st.integers(0, 5))
    def remember(self, pages, key):
        if pages and pages[0] in self.owners:
            name = bytes([key])
            if pages[0] not in self.contents and name not in self.contents.values():
                self.contents[pages[0]] = name
            self.pool.remember(pages[0], name)

    @rule(target=leases, key=st.integers(0, 5))
    def share(self, key):
        found = self.pool.match([bytes([key])])
        for page in found:
            assert self.contents[page] == bytes([key])
            self.owners[page] = self.owners.get(page, 0) + 1
        self.pool.share(found)
        return found

    @rule(pages=leases)
    def forget(self, pages):
        self.pool.forget(pages[:1])
        for page in pages[:1]:
            self.contents.pop(page, None)

    @rule(pages=consumes(leases))
    def give(self, pages):
        self.pool.give(pages)
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                del self.owners[page]

    @rule(page=st.integers(0, COUNT + 3))
    def give_wrongly(self, page):
        if page not in self.owners:
            with pytest.raises(ValueError):
                self.pool.give([page])

    @invariant()
    def accounts_balance(self):
        assert self.pool.free == COUNT - len(self.owners)
        assert all(FIRST <= p < FIRST + COUNT for p in self.owners)


TestPagePool = PagePoolMachine.TestCase


def test_keys_name_content_and_salt():
    steps = (Step(component="aa"), Step(component="bb", deltas=("dd",)))
    root = root_key(steps, "")
    assert root != root_key(steps, "salt")
    assert root != root_key((steps[0], Step(component="bb")), "")
    assert root != root_key((Step(component="aa", deltas=("bb",)), Step(component="dd")), "")
    keys = page_keys(root, list(range(40)), 16)
    assert len(keys) == 2 and keys == page_keys(root, list(range(35)), 16)
    assert page_keys(keys[0], list(range(16, 32)), 16) == keys[1:]
    assert page_keys(root, [9, *range(1, 32)], 16)[1] != keys[1]


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
    assert tight.loop.stats().pages_total == 13
    got = tight.generate(prompts, max_tokens=45)
    stats = tight.loop.stats()
    assert stats.preemptions > 0 and stats.pages_free == stats.pages_total
    assert got == expected
