"""What models are measured on: rows of text and of chats, halves to choose and to score on, and bad files."""

import dataclasses
import json
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny

from checkpoints import probes
from checkpoints.errors import BAD_INPUT
from checkpoints.probes import ProbeOptions
from jblock.adapt.probe import ProbeData, Rows
from jblock.adapt.substitution import Measured, recommend
from jblock.zoo.acceptance import AcceptancePolicy
from jblock.zoo.edge_records import Edge, Probe, Score
from jblock.zoo.records import Step
from jblock.zoo.store import Zoo

TEMPLATE = (
    "{% for m in messages %}w1 {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)


@pytest.fixture
def model(cli, tmp_path):
    """A model with a chat template, and its zoo."""
    config = tiny.CONFIG | {"max_position_embeddings": 2048}
    source = tiny.write_checkpoint(tmp_path / "src", config)
    (source / "tokenizer.json").write_text(tiny.tokenizer_json())
    (source / "chat_template.jinja").write_text(TEMPLATE)
    cli.ok("hf", source, "--name", "m")
    zoo = Zoo.open(cli.zoo)
    return zoo, zoo.chain("m")


def test_rows_are_long_and_lie_evenly_over_the_text(model, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + i // 4096}" for i in range(10 * 4096)))
    zoo, chain = model
    found = probes.probe(zoo, chain, ProbeOptions(text=tmp_path / "text.txt"))
    assert found.text.tokens.shape == (16, 512)
    assert len(set(found.text.tokens[:, -1])) == 10  # of all tenths of the text
    short = dataclasses.replace(chain, max_position=100)
    assert probes.probe(zoo, short, ProbeOptions(text=tmp_path / "text.txt")).text.tokens.shape == (
        81,
        100,
    )


def test_chats_are_rendered_as_the_model_was_trained_on(model, tmp_path):
    zoo, chain = model
    chat = [{"role": "w5", "content": "w6 w7"}, {"role": "w8", "content": "w9"}]
    (tmp_path / "text.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 300)
    items = [{"messages": chat[:1], "answer": "w9", "stop": False}]
    (tmp_path / "items.jsonl").write_text(json.dumps(items[0]))
    options = ProbeOptions(
        text=tmp_path / "text.jsonl",
        items=[str(tmp_path / "items.jsonl")],
        tokens=256,
        row_tokens=28,
    )
    found = probes.probe(zoo, chain, options)
    assert found.text.tokens[0].tolist() == [1, 5, 6, 7, 1, 8, 9] * 4
    assert found.items is not None
    assert found.items.tokens[0, :6].tolist() == [1, 5, 6, 7, 2, 9]
    assert found.items.target[0].nonzero()[0].tolist() == [5]


def test_what_is_chosen_on_is_not_scored_on():
    def rows(count):
        return Rows(np.arange(count, dtype=np.int32)[:, None], np.ones((count, 1), bool))

    data = ProbeData("p", rows(9), rows(7))
    for part in ("text", "items"):
        one, two = (set(getattr(data.half(h), part).tokens[:, 0]) for h in (False, True))
        assert not one & two and one | two == set(range(len(getattr(data, part))))
    assert data.half(False).record.digest != data.half(True).record.digest


class Fake:
    """An evaluator whose changes cost `kl[half]`, whatever they are."""

    def __init__(self, *kl):
        self.kl = kl

    def edge(self, measured, provenance, second=True):
        step = Step(component="0" * 64)
        score = Score(value=self.kl[second], low=self.kl[second], high=self.kl[second], count=9)
        probe = Probe(name="p", digest="a" * 64, tokens=9)
        return Edge(
            kind="equivalent",
            original=(step,),
            substitute=(step,),
            scores={"kl": score},
            chain="m@1",
            probe=probe,
        )

    def measure(self, changes):
        return [measured(change) for change in changes]


def measured(change):
    half = types.SimpleNamespace(kl=np.zeros(2))
    return Measured(change, (), types.SimpleNamespace(half=lambda second: half), None)


@pytest.mark.parametrize(
    ("first", "second", "chosen", "confirmed"),
    [(0.1, 0.1, True, True), (0.1, 0.9, True, False), (0.9, 0.1, False, False)],
)
def test_the_best_of_many_tries_is_not_as_good_as_it_looked(first, second, chosen, confirmed):
    accepted = AcceptancePolicy(policy="near", thresholds={"kl": 0.5})
    tried = [measured({at: Step(component=f"{at:064x}")}) for at in range(20)]
    found = recommend(Fake(first, second), tried, accepted, {})
    assert (found is not None) is chosen
    assert found is None or (not found.reasons) is confirmed
    assert found is None or len(found.measured.change) == 20


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("text.txt", b"caf\xe9 " * 3000),
        ("text.txt", b""),
        ("text.jsonl", b"[" * 100_000),
        ("text.jsonl", b'{"messages": 3}'),
        ("text.jsonl", b'{"messages": [{"role": 1}]}'),
        ("text.jsonl", b"\xff"),
        ("items.jsonl", b"\xff\xfe"),
        ("items.jsonl", b"[" * 100_000),
        ("items.jsonl", b'{"prompt": "w1"}'),
        ("items.jsonl", b'{"messages": "x", "answer": "w1"}'),
        ("items.jsonl", b"null"),
    ],
)
def test_bad_files_are_told(model, tmp_path, name, data):
    (tmp_path / "text.txt").write_text("w3 w4 " * 3000)
    (tmp_path / "items.jsonl").write_text(
        json.dumps({"prompt": "w1", "answer": "w2", "stop": False})
    )
    (tmp_path / name).write_bytes(data)
    text = tmp_path / (name if name.startswith("text") else "text.txt")
    options = ProbeOptions(text=text, items=[str(tmp_path / "items.jsonl")], row_tokens=64)
    with pytest.raises(BAD_INPUT):
        probes.probe(*model, options)


def test_a_tokenizer_that_is_none_is_told(model, tmp_path):
    zoo, chain = model
    odd = zoo.put_tokenizer({"tokenizer.json": b'{"version": "1.0"}'})
    Path(tmp_path / "text.txt").write_text("w3 w4 " * 3000)
    with pytest.raises(BAD_INPUT, match="no tokenizer"):
        probes.probe(
            zoo, dataclasses.replace(chain, tokenizer=odd), ProbeOptions(text=tmp_path / "text.txt")
        )
