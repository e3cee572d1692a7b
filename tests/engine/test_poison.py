"""NaN and Inf stay with the chain that made them: in weights, and in pages and rows left behind."""

import jax.numpy as jnp
import numpy as np
import pytest
from harness import Agent, oracle, request

from jblock.engine.config import EngineConfig

GOOD, BAD = "llama_gqa_untied", "lora_all_r8"
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=160,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=1,
)


@pytest.fixture
def agent(zoo) -> Agent:
    return Agent.make(zoo, [GOOD, BAD], CONFIG)


def poison_weights(agent: Agent, value: float) -> None:
    """Spoils the adapter's slot on the shared blocks; slot 0 stays as it is."""
    pieces = np.array(agent.graph.routes[BAD].adapter.pieces)
    for instance in agent.graph.instances:
        for unit in instance.layers:
            for tables in unit.tables:
                for name in tables:
                    if name.endswith(".b"):
                        tables[name] = tables[name].at[pieces].set(value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_poisoned_chain_fails_its_own_requests_only(agent, value):
    expected = oracle(GOOD)
    prompt = expected["prompt"]
    poison_weights(agent, value)
    for turn in range(3):  # later turns reuse the pages and rows the poisoned ones left
        for i in range(2):
            agent.loop.submit(request(f"bad{i}", BAD, prompt[: 20 + i]))
            agent.loop.submit(request(f"good{i}", GOOD, prompt))
        outputs = agent.run()
        for i in range(2):
            last = outputs[f"bad{i}"][-1]
            assert (last.finish_reason, last.error_code) == ("error", "INTERNAL"), turn
            assert BAD in last.error_message and "NaN or Inf" in last.error_message
            tokens = [t for o in outputs[f"good{i}"] for t in o.token_ids]
            assert tokens == expected["greedy"].tolist(), turn
    stats = agent.loop.stats()
    assert stats.pages_free == stats.pages_total and stats.rows_free == stats.rows_total


def test_what_pages_and_rows_held_before_reaches_nobody(agent):
    state = agent.device.state
    for shape, arrays in state.pools.items():  # all but the null page
        state.pools[shape] = tuple(a.at[1:].set(jnp.nan) for a in arrays)
    for width, registers in state.registers.items():
        state.registers[width] = jnp.full_like(registers, jnp.nan)
    expected = oracle(GOOD)
    tokens = agent.generate(
        {"a": (GOOD, expected["prompt"]), "b": (GOOD, expected["prompt_short"])}
    )
    assert tokens["a"] == expected["greedy"].tolist()
    assert tokens["b"] == expected["greedy_short"].tolist()


def test_a_sequence_preempted_before_its_nan_was_read_leaves_nothing_to_find(agent):
    """What it computed was cached as it was enqueued; nobody may find it once the NaN is known."""
    poison_weights(agent, np.nan)
    prompt = oracle(GOOD)["prompt"][:40]
    agent.loop.submit(request("bad", BAD, prompt))
    agent.loop.step()
    scheduler = agent.loop._sequences
    scheduler.preempt(scheduler.running["bad"])
    assert any(pool._key_of for pool in agent.loop.kv.pools.values())
    outputs = agent.run()
    assert outputs["bad"][-1].error_code == "INTERNAL"
    assert not any(pool._key_of for pool in agent.loop.kv.pools.values())
