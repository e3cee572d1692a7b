"""Adaptive assembly in front of an engine: what a request is bound to, when, and what its answer says."""

import dataclasses
from pathlib import Path

import pytest

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine import api
from jblock.engine.config import EngineConfig
from jblock.engine.factory import served_chains
from jblock.engine.graph.build import assemble
from jblock.engine.process.mock import MockEngine, mock_model
from jblock.engine.stats_records import BlockStats
from jblock.scheduler.adaptive import AdaptiveEngine, exact_models, with_variants
from jblock.scheduler.itinerary import Budget
from jblock.scheduler.variants import variants
from jblock.zoo import assembled
from jblock.zoo.edge_records import Edge, Probe, Score
from jblock.zoo.edges import edges, put_edges
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

MODEL = "llama_gqa_untied"
SOURCE = Path(__file__).parent.parent / "fixtures" / "hf" / MODEL
NEAR = Budget(policy="near", damage=0.1)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Zoo:
    """A model, and two edges that put one layer's ffn in the place of another's."""
    path = tmp_path_factory.mktemp("adaptive") / "zoo"
    hf.convert(SOURCE, path, MODEL, Progress(False))
    store = Zoo.open(path)
    steps = store.chain(MODEL).steps
    ffns = [s for s in steps if store.component(s.component).spec.kind == "ffn"]
    put_edges(store, edge(ffns[0], ffns[1], 0.03), edge(ffns[2], ffns[1], 0.05))
    return store


def edge(original, substitute, kl: float, chain: str = f"{MODEL}@1") -> Edge:
    return Edge(
        kind="equivalent",
        original=(original,),
        substitute=(substitute,),
        scores={"kl": Score(value=kl / 2, low=0.0, high=kl, count=100)},
        chain=chain,
        probe=Probe(name="text", digest="0" * 64, tokens=100),
    )


class Engine(MockEngine):
    """A mock engine that says of its blocks what a test wants."""

    def __init__(self, zoo: Zoo, names):
        super().__init__([mock_model({"name": name.partition("@")[0]}) for name in names])
        self.zoo = [
            mock_model({"name": n.partition("@")[0]}) for n in with_variants(zoo, [MODEL], NEAR)
        ]
        self.blocks: tuple[BlockStats, ...] = ()
        self.others: list[api.AgentStatus] = []
        self.asked: list[api.Request] = []

    def stats(self) -> api.EngineStats:
        return dataclasses.replace(super().stats(), blocks=self.blocks)

    def agents(self) -> tuple[api.AgentStatus, ...]:
        return tuple(self.others)

    def submit(self, request: api.Request) -> None:
        self.asked.append(request)
        super().submit(request)


@pytest.fixture
def inner(zoo):
    engine = Engine(zoo, with_variants(zoo, [MODEL], NEAR))
    yield engine
    engine.close()


def blocks(zoo: Zoo, absent=(), busy=()) -> tuple[BlockStats, ...]:
    """Of every component a block of a millisecond a row."""
    return tuple(
        BlockStats(
            block=f"layer_{s.component[:8]}",
            rows=1000,
            seconds=1.0,
            weight_bytes=1000,
            resident_bytes=0 if s.component in absent else 1000,
            queue_rows=1000 if s.component in busy else 0,
        )
        for s in zoo.chain(MODEL).steps
    )


def ask(name: str = "r", **more) -> api.Request:
    sampling = api.SamplingParams(max_tokens=4)
    return api.Request(request_id=name, model=MODEL, token_ids=(5, 6, 7), sampling=sampling, **more)


def answer(engine: api.Engine) -> list[api.Output]:
    found: list[api.Output] = []
    while not found or found[-1].finish_reason is None:
        found += engine.poll(10.0)
    return found


def test_a_request_is_bound_to_what_is_there_and_its_answer_says_so(zoo, inner):
    engine = AdaptiveEngine(inner, zoo, NEAR)
    assert [m.name for m in engine.models()] == [MODEL]
    first, second = sorted(edges(zoo), key=lambda e: e.scores["kl"].high)
    inner.blocks = blocks(zoo, absent={first.original[0].component})
    engine.submit(ask(policy="near"))
    told = answer(engine)
    assert [o.bound is not None for o in told] == [True] + [False] * (len(told) - 1)
    bound = told[0].bound
    assert bound is not None
    assert bound.served_as == assembled.assembled_name(MODEL, [first.id])
    assert (bound.policy, bound.measure, bound.damage) == ("near", "kl", 0.03)
    (asked,) = inner.asked
    assert asked.model == bound.served_as and asked.policy == "exact"
    # Both where both are busy.
    inner.blocks = blocks(zoo, busy={e.original[0].component for e in (first, second)})
    engine.submit(ask(policy="adaptive"))
    bound = answer(engine)[0].bound
    assert bound is not None and bound.damage == pytest.approx(0.08)
    assert bound.served_as == assembled.assembled_name(MODEL, [first.id, second.id])


def test_nobody_gets_what_was_not_asked_for(zoo, inner):
    engine = AdaptiveEngine(inner, zoo, NEAR)
    engine.models()
    first = min(edges(zoo), key=lambda e: e.scores["kl"].high)
    busy = blocks(zoo, busy={first.original[0].component})
    for request, now in (
        (ask(), busy),
        (ask(policy="near", max_damage=0.02), busy),
        (ask(policy="near", generated=(5,)), busy),
        (ask(policy="near"), blocks(zoo)),  # nothing is gained
        (ask(policy="near"), ()),  # nothing is known
    ):
        inner.blocks = now
        engine.submit(request)
        assert all(o.bound is None for o in answer(engine))
        assert inner.asked[-1].model == MODEL


def agent(name: str, of: tuple[BlockStats, ...], up: bool = True) -> api.AgentStatus:
    stats = dataclasses.replace(MockEngine([]).stats(), blocks=of)
    return api.AgentStatus(name=name, up=up, models=(f"{MODEL}@1",), requests=0, stats=stats)


def test_of_several_agents_one_that_has_what_is_exact_is_enough(zoo, inner):
    engine = AdaptiveEngine(inner, zoo, NEAR)
    engine.models()
    first = min(edges(zoo), key=lambda e: e.scores["kl"].high)
    free, busy = blocks(zoo), blocks(zoo, busy={first.original[0].component})
    inner.blocks = busy
    for others, is_bound in (
        ([agent("0", busy), agent("1", free)], False),
        ([agent("0", busy), agent("1", free, up=False)], True),
        ([agent("0", busy), agent("1", busy)], True),
        # Each has a part: what all of them say together counts.
        ([agent("0", free[:3]), agent("1", free[3:])], True),
    ):
        inner.others = others
        engine.submit(ask(policy="near"))
        assert (answer(engine)[0].bound is not None) == is_bound


def test_what_may_stand_for_a_model_comes_and_goes_with_it(zoo, inner):
    engine = AdaptiveEngine(inner, zoo, NEAR)
    assert engine.models() == engine.serve([MODEL], [f"{MODEL}@1"])
    assert len(inner.models()) == 4
    assert exact_models(zoo) == [MODEL]
    assert with_variants(zoo, ["gone"], NEAR) == ["gone"]


def test_variants_keep_to_the_budget(zoo):
    chain, known = zoo.chain(MODEL), edges(zoo)
    damages = {0.02: 0, 0.03: 1, 0.05: 2, 0.08: 3, 1.0: 3}
    for damage, count in damages.items():
        found = variants(chain, known, Budget(policy="near", damage=damage))
        assert len(found.chains) == count
    assert not variants(chain, known, Budget()).chains
    elsewhere = [dataclasses.replace(e, chain="other@1") for e in known]
    assert not variants(chain, elsewhere, NEAR).chains


def test_what_was_measured_together_counts_and_nothing_is_bound_that_is_not_served(zoo, inner):
    one, two = edges(zoo)
    both = assembled.assembled(zoo.chain(MODEL), [one, two])
    at = [a != b for a, b in zip(both.steps, zoo.chain(MODEL).steps, strict=True)]
    run = slice(at.index(True), len(at) - at[::-1].index(True))
    joint = dataclasses.replace(
        edge(one.original[0], one.substitute[0], 0.5),
        original=zoo.chain(MODEL).steps[run],
        substitute=both.steps[run],
    )
    found = variants(zoo.chain(MODEL), [one, two, joint], NEAR)
    assert both.steps not in {c.steps for c in found.chains} and len(found.chains) == 2
    engine = AdaptiveEngine(inner, zoo, NEAR)
    engine.models()
    engine._variants = {MODEL: found}
    inner.blocks = blocks(zoo, busy={e.original[0].component for e in (one, two)})
    engine.submit(ask(policy="near"))
    bound = answer(engine)[0].bound
    assert bound is not None and bound.served_as.count("+") == 1


def test_an_engine_serves_them_of_the_same_blocks(zoo):
    config = EngineConfig(max_num_seqs=4, max_model_len=64)
    chains = served_chains(zoo, with_variants(zoo, [MODEL], NEAR), config)
    routes = assemble(zoo, chains, config).routes
    assert len(routes) == 4 and {r.chain.policy for r in routes.values()} == {"exact", "near"}
    own = {w for w in routes[MODEL].weights.members}
    assert all(own.issuperset(route.weights.members) for route in routes.values())


def test_an_assembled_chain_is_found_by_its_name(zoo):
    one, two = edges(zoo)
    made = assembled.serve(zoo, assembled.assembled_name(MODEL, [one.id, two.id]) + "@1")
    assert (made.policy, made.version) == ("near", 1)
    assert assembled.is_assembled(made.name) and not assembled.is_assembled(MODEL)
    changed = [a != b for a, b in zip(made.steps, zoo.chain(MODEL).steps, strict=True)]
    assert sum(changed) == 2
    for wrong, says in ((f"{MODEL}+{'f' * 12}", "0 edges"), (f"{MODEL}+", "edges begin")):
        with pytest.raises(ZooError, match=says):
            assembled.serve(zoo, wrong)
    with pytest.raises(ZooError, match="has no one place"):
        assembled.assembled(zoo.chain(MODEL), [dataclasses.replace(one, chain="other@1")])
    with pytest.raises(ZooError, match="the same step"):
        assembled.assembled(zoo.chain(MODEL), [one, one])
