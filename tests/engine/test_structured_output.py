"""Answers that keep to a grammar: whatever else is asked of them, and whatever happens to the engine."""

import dataclasses
import json
import os
import signal
import threading
from multiprocessing.connection import Pipe
from pathlib import Path

import numpy as np
import pytest
from harness import SMALL, Agent, request
from llguidance import LLMatcher
from tokenizers import Tokenizer

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.engine.structured_output import wire, worker
from jblock.engine.structured_output.grammars import Grammars

DEMO = Path(__file__).parent.parent.parent / "examples" / "models" / "demo-1m"
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
CONFIG = dataclasses.replace(SMALL, max_model_len=128)
WORDS = LLMatcher.grammar_from_regex("(red|green|blue)( (red|green|blue)){5}")
OBJECT = LLMatcher.grammar_from_json_schema(
    {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    overrides={"whitespace_flexible": False},
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    path = tmp_path_factory.mktemp("structured") / "zoo"
    hf.convert(DEMO, path, "demo", Progress(False))
    return path


@pytest.fixture
def agents():
    made = []
    yield made
    for agent in made:
        agent.loop.constrained.grammars.close()


@pytest.fixture
def agent(zoo, agents):
    agents.append(Agent.make(zoo, ["demo"], CONFIG))
    return agents[0]


def prompt(text="Once upon a time"):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def ask(agent, count=3, **sampling):
    """Ids of requests that keep to a grammar, and one that does not."""
    for i in range(count):
        options = {"grammar": (WORDS, OBJECT)[i % 2], "ignore_eos": False, "seed": i, **sampling}
        agent.loop.submit(request(str(i), "demo", prompt(), **options))
    agent.loop.submit(request("free", "demo", prompt(), max_tokens=40))


def texts(outputs):
    found = {}
    for name, parts in outputs.items():
        assert not parts[-1].error_message, parts[-1]
        found[name] = TOKENIZER.decode([t for o in parts for t in o.token_ids])
    return found


def check(found, count=3):
    for i in range(count):
        text = found[str(i)]
        if i % 2:
            assert set(json.loads(text)) == {"a", "b"}
        else:
            assert len(text.split()) == 6 and set(text.split()) <= {"red", "green", "blue"}


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": ((5, 3.0),)},
        {"min_tokens": 40, "stop_token_ids": (5,)},
    ],
    ids=str,
)
def test_answers_keep_to_their_grammars_beside_one_that_has_none(agent, sampling):
    alone = agent.generate({"free": ("demo", prompt())}, max_tokens=40)["free"]
    ask(agent, **sampling)
    outputs = agent.run()
    check(texts(outputs))
    assert all(outputs[str(i)][-1].finish_reason == "stop" for i in range(3))
    assert [t for o in outputs["free"] for t in o.token_ids] == alone
    assert agent.loop.idle


def test_log_probabilities_are_of_the_unmodified_logits(agent):
    agent.loop.submit(
        request("one", "demo", prompt(), grammar=WORDS, logprobs=True, top_logprobs=2)
    )
    seen = agent.device.seen
    outputs = agent.run()["one"]
    rows = [logits[0] for batch, logits in seen if batch.items and batch.items[0].samples]
    told = [o for o in outputs if o.token_ids]
    for output, logits in zip(told, rows, strict=False):
        total = np.logaddexp.reduce(logits.astype(np.float64))
        assert output.logprobs[0] == pytest.approx(logits[output.token_ids[0]] - total, abs=1e-4)
        assert output.top_logprobs[0][0][0] == int(logits.argmax())


def test_a_row_whose_mask_is_late_sits_out_and_changes_nothing(agent, monkeypatch):
    ask(agent, temperature=1.0, repetition_penalty=1.2)
    expected = agent.run()
    agent.loop.constrained.late = 0
    grammars = agent.loop.constrained.grammars
    turns = iter(range(10**9))
    wait = grammars.wait

    def impatient(constraints, seconds):
        # Two of three times nobody waits, and no mask is there.
        constraints = list(constraints)
        wait(constraints, 20.0)
        if next(turns) % 3:
            late = [(c, c.mask) for c in constraints if c.mask is not None]
            for constraint, mask in late:
                constraint.mask = None
                held.append((constraint, mask))

    held = []
    step = agent.loop.step

    def with_masks():
        outputs = step()
        for constraint, mask in held:
            constraint.mask = mask
        held.clear()
        return outputs

    monkeypatch.setattr(grammars, "wait", impatient)
    monkeypatch.setattr(agent.loop, "step", with_masks)
    ask(agent, temperature=1.0, repetition_penalty=1.2)
    assert texts(agent.run()) == texts(expected)
    assert agent.loop.constrained.late > 5


def test_what_is_delivered_is_gone_on_from(agent):
    """As a supervisor resumes a request in another process."""
    ask(agent, temperature=1.0)
    expected = agent.run()
    for name, cut in (("0", 3), ("1", 2)):
        tokens = [t for o in expected[name] for t in o.token_ids]
        grammar = (WORDS, OBJECT)[int(name)]
        fresh = request(
            name,
            "demo",
            prompt(),
            grammar=grammar,
            ignore_eos=False,
            seed=int(name),
            temperature=1.0,
        )
        agent.loop.submit(dataclasses.replace(fresh, generated=tuple(tokens[:cut])))
        rest = [t for o in agent.run()[name] for t in o.token_ids]
        assert rest == tokens[cut:]


def test_preempted_sequences_go_on_within_their_grammars(zoo, agents):
    config = dataclasses.replace(CONFIG, kv_pages=6, page_size=8)
    tight = Agent.make(zoo, ["demo"], config)
    agents.append(tight)
    ask(tight, count=4, temperature=1.0)
    outputs = tight.run()
    check(texts(outputs), 4)
    assert tight.loop._sequences.preemptions


def test_a_grammar_that_breaks_ends_its_own_request(agent):
    broken = LLMatcher.grammar_from_lark("start: nowhere")
    agent.loop.submit(request("broken", "demo", prompt(), grammar=broken))
    ask(agent)
    outputs = agent.run()
    last = outputs.pop("broken")[-1]
    assert last.error_code == "INVALID_ARGUMENT" and last.error_message.startswith("grammar: ")
    check(texts(outputs))


def test_the_process_of_grammars_may_end_at_any_time(agent):
    ask(agent)
    process = None
    outputs = {}
    for turn in range(10**6):
        for output in agent.loop.step():
            outputs.setdefault(output.request_id, []).append(output)
        process = agent.loop.constrained.grammars._process
        if turn and len(outputs.get("0", ())) == 2 and process is not None:
            os.kill(process.pid, signal.SIGKILL)
            break
    for name, more in agent.run().items():
        outputs.setdefault(name, []).extend(more)
    check(texts(outputs))


def test_a_sequence_under_which_two_processes_end_is_refused(monkeypatch):
    monkeypatch.setattr(Grammars, "_start", lambda self: None)  # None ever answers.
    grammars = Grammars()
    constraint = grammars.begin("one", WORDS, str(DEMO / "tokenizer.json"), 1024, (0,), ())
    grammars._replace()
    assert not constraint.settled and grammars.over() == []
    grammars._replace()
    assert "ended the process" in constraint.problem and grammars.over() == [constraint]


def test_a_token_told_while_a_sequence_begins_waits_for_that(monkeypatch):
    """As after a process ended: the next one begins anew while the token of an old mask is read."""
    begun = threading.Event()

    def start(self):
        assert begun.wait(10)
        self._matcher = object()
        return wire.State(1, 0, b"\1")

    def take(self, token):
        assert self._matcher is not None
        return wire.State(1, 1, b"\2")

    monkeypatch.setattr(worker.Matcher, "start", start)
    monkeypatch.setattr(worker.Matcher, "take", take)
    ours, theirs = Pipe()
    threading.Thread(target=worker.Worker(theirs).run, daemon=True).start()
    first = wire.Begin(1, "t", 5, (0,), "g", ())
    ours.send_bytes(wire.encoder.encode([first, wire.Take(1, 7)]))
    begun.set()
    found = []
    while len(found) < 2:
        assert ours.poll(10)
        found += wire.to_engine.decode(ours.recv_bytes())
    ours.close()
    assert found == [wire.State(1, 0, b"\1"), wire.State(1, 1, b"\2")]


def test_messages_are_read_back():
    messages = [wire.Begin(1, "t", 5, (0,), "g", (1, 2)), wire.Take(1, 7), wire.End(1)]
    assert wire.to_worker.decode(wire.encoder.encode(messages)) == messages
    states = [wire.State(1, 2, b"\1\2"), wire.State(1, 3, problem="x")]
    assert wire.to_engine.decode(wire.encoder.encode(states)) == states
