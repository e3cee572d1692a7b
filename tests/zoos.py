"""Small zoos made without a checkpoint."""

import json

import msgspec
import numpy as np

from jblock.blocks.delta_spec import LoraSpec, LoraTarget
from jblock.blocks.spec import (
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    UnembeddingSpec,
)
from jblock.zoo.pointer import entry_of
from jblock.zoo.records import Chain, Step

VOCAB, HIDDEN = 8, 4
EMBEDDING = EmbeddingSpec(vocab_size=VOCAB, hidden_size=HIDDEN)
FFN = FfnSpec(hidden_size=HIDDEN, intermediate_size=6, norm_eps=1e-5)
NORM = NormSpec(hidden_size=HIDDEN, eps=1e-5)
HEAD = UnembeddingSpec(vocab_size=VOCAB, hidden_size=HIDDEN)
LORA = LoraSpec(targets={"up": LoraTarget(rank=2, scale=0.5)})


def tensors(spec, seed=0, dtype=np.float32):
    """Random tensors of a component."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(dtype) for n, s in spec.tensors().items()}


def lora_tensors(seed=0):
    """Random tensors of LORA on FFN."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype("f4") for n, s in LORA.tensors(FFN).items()}


def fill(zoo, name="m", seed=0):
    """Adds a tied model with one ffn and a delta on it; returns its chain."""
    embedding = zoo.put_component(EMBEDDING, tensors(EMBEDDING, seed))
    ffn = zoo.put_component(FFN, tensors(FFN, seed))
    norm = zoo.put_component(NORM, tensors(NORM, seed))
    head = zoo.put_component(HEAD, {}, {"weight": (embedding, "weight")})
    delta = zoo.put_delta(LORA, ffn, lora_tensors(seed))
    tokenizer = zoo.put_tokenizer({"tokenizer.json": b"{}", "merges.txt": b"a b"})
    steps = (
        Step(component=embedding),
        Step(component=ffn, deltas=(delta,)),
        Step(component=norm),
        Step(component=head),
    )
    return zoo.publish(
        Chain(
            name=name,
            family="llama",
            steps=steps,
            tokenizer=tokenizer,
            max_position=16,
            vocab_size=VOCAB,
            source={"a": [1, 2.5, None]},
        )
    )


def fit_record(zoo, name, version=1):
    """Makes a model's pointer say of a version what the record says, as a hostile zoo's does."""
    data = (zoo.path / "chains" / name / f"{version}.json").read_bytes()
    path = zoo.path / "chains" / name / "model.json"
    model = json.loads(path.read_text())
    entry = msgspec.to_builtins(entry_of(Chain.from_json(json.loads(data)), data))
    entry["version"] = version
    model["versions"] = [entry if e["version"] == version else e for e in model["versions"]]
    path.write_text(json.dumps(model))


def forget_records(zoo, name):
    """Makes a model's pointer one from before it had the hashes of records."""
    path = zoo.path / "chains" / name / "model.json"
    data = json.loads(path.read_text())
    for entry in data["versions"]:
        for field in entry.keys() - {"version", "digest", "named"}:
            del entry[field]
        ids = [entry["named"][i : i + 16] for i in range(0, len(entry["named"]), 16)]
        entry["named"] = "".join(i[:8] for i in ids)
    path.write_text(json.dumps(data))
