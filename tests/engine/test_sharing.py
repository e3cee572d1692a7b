"""Sharing changes nothing: who else is in the batch, and whether blocks are shared, cannot be seen in a
request's tokens."""

import dataclasses

import numpy as np
import pytest
from harness import BASES, Agent, oracle, request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jblock.engine.config import EngineConfig
from jblock.engine.scheduling.step_budget import NO_LIMIT

MODELS = [
    "llama_gqa_untied",
    "lora_all_r8",
    "lora_qv_r4",
    "lora_rslora_r16",
    "mistral_window",
    "qwen3_qknorm",
    "qwen3_lora_all_r8",
]
# One grid for decoding and one for prefill: one execution plan, whatever the batch.
ONE_PLAN = EngineConfig(
    max_num_seqs=8,
    max_model_len=128,
    page_size=16,
    decode_sizes=(8,),
    prefill_grids=((8, 16),),
    kv_memory_mb=2,
)
MANY_PLANS = EngineConfig(
    max_num_seqs=8,
    max_model_len=128,
    page_size=16,
    decode_sizes=(1, 8),
    prefill_grids=((1, 16), (1, 32), (8, 32)),
    kv_memory_mb=2,
)
LOGIT_ERROR = 1e-4


@pytest.fixture(scope="module")
def shared(zoo) -> Agent:
    """All models on one set of blocks, on a device that seems so slow that one layer fills a step."""
    agent = Agent.make(zoo, MODELS, ONE_PLAN)
    agent.slow_down(1e4)
    return agent


@pytest.fixture(scope="module")
def alone(shared) -> "Alone":
    return Alone(shared)


class Alone:
    """What a request's tokens and log-probabilities are when nobody else is there; remembered."""

    def __init__(self, agent: Agent):
        self.agent, self.known = agent, {}

    def __call__(self, model: str, prompt: tuple[int, ...], options: tuple) -> list:
        key = (model, prompt, options)
        if key not in self.known:
            self.agent.loop.submit(request("alone", model, prompt, logprobs=True, **dict(options)))
            self.known[key] = transcript(self.agent.run()["alone"])
        return self.known[key]


def transcript(outputs) -> list:
    """(token, log-probability) of every output, in order."""
    return [pair for o in outputs for pair in zip(o.token_ids, o.logprobs, strict=True)]


requests = st.lists(
    st.tuples(
        st.sampled_from(MODELS),
        st.sampled_from([1, 3, 15, 16, 17, 30, 33]),  # prompt length
        st.integers(0, 2),  # where in the oracle's prompt it starts
        st.sampled_from([1, 2, 9]),  # tokens to generate
        st.sampled_from([0.0, 0.8]),  # temperature
        st.integers(0, 12),  # step it arrives at
        st.one_of(st.none(), st.none(), st.integers(0, 8)),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=14,
)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(arrivals=requests, step_ms=st.sampled_from([1, NO_LIMIT]))
def test_bit_identical_within_one_plan_whatever_else_arrives(shared, alone, arrivals, step_ms):
    """Rows that are held in a queue, or between two layers, included."""
    loop, outputs, cancelled = shared.loop, {}, set()
    loop.config = dataclasses.replace(loop.config, step_ms=step_ms)
    free = loop.stats().pages_free, loop.stats().rows_free
    pending = dict(enumerate(arrivals))
    wanted = {}
    step = 0
    while pending or not loop.idle:
        for i, (model, length, begin, tokens, temperature, at, _) in list(pending.items()):
            if at <= step:
                del pending[i]
                prompt = tuple(oracle(model)["prompt"][begin : begin + length].tolist())
                options = (("max_tokens", tokens), ("temperature", temperature), ("seed", i))
                wanted[str(i)] = (model, prompt, options)
                loop.submit(request(str(i), model, prompt, logprobs=True, **dict(options)))
        for i, (*_, at, leaves) in enumerate(arrivals):
            if leaves is not None and step == at + leaves:
                loop.cancel(str(i))
        for output in loop.step():
            outputs.setdefault(output.request_id, []).append(output)
            if output.finish_reason == "cancelled":
                cancelled.add(output.request_id)
        step += 1
    assert (loop.stats().pages_free, loop.stats().rows_free) == free
    for request_id, what in wanted.items():
        got, expected = transcript(outputs[request_id]), alone(*what)
        assert outputs[request_id][-1].finish_reason is not None
        if request_id in cancelled:
            expected = expected[: len(got)]
        assert got == expected, f"request {request_id} of {what[0]} changed"


def test_the_same_tokens_with_sharing_on_off_and_in_other_batches(zoo):
    """The token rule across execution plans: greedy tokens agree, or part where the reference's two
    best logits are closer than ten times the logit error."""
    models = MODELS[:3]
    prompts = {m: (m, oracle(m)["prompt"][:41]) for m in models}
    reference = Agent.make(zoo, models, MANY_PLANS)
    alone = {m: reference.generate({m: p}, max_tokens=40)[m] for m, p in prompts.items()}
    gaps = {m: top_gaps(reference, m) for m in models}
    together = reference.generate(prompts, max_tokens=40)
    unshared_config = EngineConfig(**{**vars(MANY_PLANS), "share": False})
    unshared = Agent.make(zoo, models, unshared_config)
    assert unshared.loop.stats().resident_bytes > reference.loop.stats().resident_bytes
    assert len(unshared.graph.instances) > len(reference.graph.instances)
    separate = unshared.generate(prompts, max_tokens=40)
    for m in models:
        for other in (together[m], separate[m]):
            assert_token_rule(alone[m], other, gaps[m])


def top_gaps(agent: Agent, model: str) -> list[float]:
    """Gap between the two best logits at each generated token of a model's lone run."""
    gaps = {}
    for batch, logits in agent.device.seen:
        for i, item in enumerate(batch.items):
            if item.sequence.request.request_id == model and item.samples:
                second, best = np.partition(logits[i], -2)[-2:]
                gaps.setdefault(item.start + item.q_len, float(best - second))
    return [gap for _, gap in sorted(gaps.items())]


def assert_token_rule(reference: list[int], other: list[int], gaps: list[float]) -> None:
    """See the token rule in docs/architecture.md."""
    assert len(reference) == len(other)
    first = next((i for i, (a, b) in enumerate(zip(reference, other, strict=True)) if a != b), None)
    assert first is None or gaps[first] < 10 * LOGIT_ERROR


def test_rows_of_base_and_adapters_meet_in_one_call(shared):
    models = ["llama_gqa_untied", "lora_all_r8", "lora_qv_r4", "lora_rslora_r16"]
    prompts = {m: (m, oracle(m)["prompt"][:5]) for m in models}
    shared.loop.config = dataclasses.replace(ONE_PLAN, step_ms=NO_LIMIT)
    before = shared.loop.stats()
    shared.generate(prompts, max_tokens=8)
    after = shared.loop.stats()
    calls = after.block_calls - before.block_calls
    assert (after.block_rows - before.block_rows) / calls >= 4
    assert after.model_calls - before.model_calls == 8 * len(models)


def test_models_of_different_widths_share_one_agent(shared):
    hidden = {u.signature.hidden_size for i in shared.graph.instances for u in i.layers}
    assert len(hidden) > 1
    assert set(MODELS) <= set(shared.graph.routes) and set(BASES)
