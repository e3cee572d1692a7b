"""What a record says of itself is not believed: policy, order, widths, references and sizes are checked."""

import dataclasses
import json
import os

import numpy as np
import pytest
import zoos
from safetensors.numpy import load_file

from jblock.adapt.quantization import quantize_chain
from jblock.blocks.compressed_spec import LowRankSpec
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import FfnSpec, NormSpec, StitchSpec
from jblock.zoo import transfer
from jblock.zoo.fsck import fsck
from jblock.zoo.records import Chain, DamagedError, Step, ZooError
from jblock.zoo.store import Zoo
from jblock.zoo.verification import Verification


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    return zoo


def changed(chain, **fields):
    return dataclasses.replace(chain, version=0, **fields)


# Policy


def test_a_quantized_chain_that_says_exact_is_refused(zoo):
    wide = FfnSpec(hidden_size=64, intermediate_size=64, norm_eps=1e-5)
    steps = [
        zoo.put_component(s, zoos.tensors(s))
        for s in (
            dataclasses.replace(zoos.EMBEDDING, hidden_size=64),
            wide,
            dataclasses.replace(zoos.NORM, hidden_size=64),
            dataclasses.replace(zoos.HEAD, hidden_size=64),
        )
    ]
    chain = zoo.publish(
        changed(zoo.chain("m"), name="w", steps=tuple(Step(component=s) for s in steps))
    )
    made = quantize_chain(zoo, chain, "w-int4", QuantSpec(bits=4, group=64))
    assert made.policy == "near"
    with pytest.raises(DamagedError, match="its content makes it near"):
        zoo.publish(changed(made, name="x", policy="exact", derived={}))
    # Nor is it believed in a record that lies in a zoo already.
    path = zoo.path / "chains" / "w-int4" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"policy": "exact", "derived": {}}))
    assert any("w-int4@1" in p for p in fsck(zoo))
    for call in (zoo.chain, zoo.serve):
        with pytest.raises(ZooError, match="digest"):
            call("w-int4")
    with pytest.raises(ZooError):
        transfer.copy(zoo, Zoo.create(zoo.path.parent / "other"), "w-int4")


def test_compressed_stitched_and_derived_chains_are_not_exact(zoo):
    chain = zoo.chain("m")
    stitch = StitchSpec(hidden_size=4, output_size=4, inner_size=4, depths=(0,), norm_eps=1e-5)
    stitched = Step(component=zoo.put_component(stitch, zoos.tensors(stitch)))
    with pytest.raises(DamagedError, match="adaptive"):
        zoo.publish(changed(chain, steps=(*chain.steps[:2], stitched, *chain.steps[2:])))
    for command, least in (("compress", "near"), ("surrogate", "adaptive"), ("new", "near")):
        derived = {"chain": "m@1", "command": command}
        with pytest.raises(DamagedError, match=least):
            zoo.publish(changed(chain, name="x", derived=derived))
    low_rank = LowRankSpec(targets={"up": 1})
    values = {n: np.ones(s, low_rank.dtype(n)) for n, s in low_rank.tensors(zoos.FFN).items()}
    ffn = chain.steps[1].component
    delta = zoo.put_delta(low_rank, ffn, values)
    steps = (chain.steps[0], Step(component=ffn, deltas=(delta,)), *chain.steps[2:])
    with pytest.raises(DamagedError, match="near"):
        zoo.publish(changed(chain, name="x", steps=steps))
    assert zoo.publish(changed(chain, name="x", steps=steps, policy="near")).policy == "near"


# Order, kinds, widths, family


def test_steps_have_to_meet(zoo):
    chain = zoo.chain("m")
    embedding, ffn, norm, head = chain.steps
    wide = FfnSpec(hidden_size=6, intermediate_size=6, norm_eps=1e-5)
    other = Step(component=zoo.put_component(wide, zoos.tensors(wide)))
    odd = NormSpec(hidden_size=4, eps=1e-3)
    inside = Step(component=zoo.put_component(odd, zoos.tensors(odd)))
    for steps in (
        (),
        (embedding,),
        (ffn, embedding, norm, head),
        (embedding, norm, ffn, head),
        (embedding, ffn, head, norm),
        (embedding, other, norm, head),
        (embedding, inside, norm, head),
        (embedding, ffn, norm, head, ffn),
    ):
        with pytest.raises(ZooError):
            zoo.publish(changed(chain, name="x", steps=steps))
    for fields in ({"family": "nope"}, {"vocab_size": 9}, {"tokenizer": "0" * 64}):
        with pytest.raises(ZooError):
            zoo.publish(changed(chain, name="x", **fields))
    assert zoo.chains() == ["m"]


def test_the_digest_covers_what_decides_the_answers(zoo):
    chain = zoo.chain("m")
    same = (
        changed(chain, name="other"),
        changed(chain, source={"x": 1}),
        changed(chain, source_files="0" * 64),
    )
    assert {c.digest for c in same} == {chain.digest}
    ffn = chain.steps[1]
    others = (
        changed(
            chain, steps=(chain.steps[0], dataclasses.replace(ffn, deltas=()), *chain.steps[2:])
        ),
        changed(chain, steps=(*chain.steps[:2], ffn, *chain.steps[2:])),
        changed(chain, tokenizer=None),
        changed(chain, eos_token_ids=(1,)),
        changed(chain, bos_token_id=1),
        changed(chain, generation={"temperature": 0.5}),
        changed(chain, policy="near"),
        changed(chain, max_position=8),
    )
    digests = [c.digest for c in (chain, *others)]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", {"a": 1}),
        ("base", "base"),
        ("base", "base@x"),
        ("base", "m@99"),
        ("tokenizer", 5),
        ("generation", [1, 2]),
        ("source", ["x"]),
        ("bos_token_id", "x"),
        ("steps", []),
        ("steps", {}),
        ("steps", [1]),
        ("steps", [{"component": 1, "deltas": []}]),
        ("steps", [{"component": "0" * 64, "deltas": "0" * 64}]),
        ("eos_token_ids", "ab"),
        ("eos_token_ids", [1.0]),
        ("policy", ["exact"]),
        ("derived", None),
        ("whole", {"99": "0" * 64}),
        ("whole", {"-1": "0" * 64}),
        ("family", None),
        ("name", 3),
        ("version", True),
    ],
)
def test_odd_fields_are_told_never_a_traceback(zoo, tmp_path, field, value):
    path = zoo.path / "chains" / "m" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    target = Zoo.create(tmp_path / "other")
    with pytest.raises(ZooError):
        transfer.copy(zoo, target, "m")
    assert fsck(zoo)
    assert target.chains() == []


def test_bases_that_name_each_other_are_told(zoo, tmp_path):
    chain = zoo.chain("m")
    zoo.publish(changed(chain, name="a", base="m@1"))
    path = zoo.path / "chains" / "m" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base": "a@1"}))
    zoos.forget_records(zoo, "m")  # a hostile zoo has hashes that fit
    with pytest.raises(DamagedError, match="name each other"):
        transfer.copy(zoo, Zoo.create(tmp_path / "other"), "a")


def test_components_that_refer_to_each_other_are_told(zoo, tmp_path):
    head = zoo.chain("m").steps[3].component
    path = zoo.path / "components" / head / "spec.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"refs": {"weight": [head, "weight"]}}))
    with pytest.raises(DamagedError, match="refers to itself"):
        transfer.copy(zoo, Zoo.create(tmp_path / "other"), "m")


# Content


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "4"},
        {"hidden_size": 4.0},
        {"hidden_size": True},
        {"norm_eps": "x"},
        {"norm_eps": None},
        {"gated": 1},
        {"activation": 3},
        {"intermediate_size": 10**12},
        {"intermediate_size": -6},
    ],
)
def test_specs_of_odd_types_are_damage(zoo, change):
    ffn = zoo.chain("m").steps[1].component
    path = zoo.path / "components" / ffn / "spec.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"spec": data["spec"] | change}))
    with pytest.raises(DamagedError):
        zoo.component(ffn)
    assert fsck(zoo)


def test_not_a_number_is_no_json(zoo):
    ffn = zoo.chain("m").steps[1].component
    path = zoo.path / "components" / ffn / "spec.json"
    path.write_text(path.read_text().replace("1e-05", "NaN"))
    with pytest.raises(DamagedError, match="NaN"):
        zoo.component(ffn)


def test_a_file_that_is_mostly_holes_is_not_loaded(zoo):
    rows, width = 2**20, 2**14
    spec = dataclasses.replace(zoos.EMBEDDING, vocab_size=rows, hidden_size=width)
    embedding = zoo.chain("m").steps[0].component
    folder = zoo.path / "components" / embedding
    data = json.loads((folder / "spec.json").read_text())
    data["spec"] |= {"vocab_size": rows, "hidden_size": width}
    data["tensors"]["weight"] = {"shape": [rows, width], "dtype": "float16"}
    data["nbytes"] = rows * width * 2
    (folder / "spec.json").write_text(json.dumps(data))
    from jblock.zoo import params

    header = params._header(zoo.component(embedding).tensors)
    with open(folder / "params.safetensors", "wb") as f:
        f.write(header)
        f.truncate(len(header) + data["nbytes"])
    assert zoo.component(embedding).spec == spec
    with pytest.raises(DamagedError, match="on the disk"):
        zoo.load_component(embedding)


def test_large_files_beside_a_model_are_not_read(zoo):
    tokenizer = zoo.path / "tokenizers" / (zoo.chain("m").tokenizer or "")
    with open(tokenizer / "merges.txt", "wb") as f:
        f.truncate(2**33)
    with pytest.raises(DamagedError, match="at most"):
        zoo.files("tokenizers", tokenizer.name)


def test_any_safetensors_library_reads_a_component(zoo):
    ffn = zoo.chain("m").steps[1].component
    found = load_file(zoo.path / "components" / ffn / "params.safetensors")
    assert found.keys() == zoos.tensors(zoos.FFN).keys()
    assert all((found[n] == t).all() for n, t in zoos.tensors(zoos.FFN).items())


# Hashes on loading


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("mode", ["always", "once", "never"])
def test_hashes_are_checked_on_loading(zoo, tmp_path, monkeypatch, mode):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chain = zoo.chain("m")
    ffn, delta = chain.steps[1].component, chain.steps[1].deltas[0]
    loads = (
        (f"components/{ffn}/params.safetensors", lambda z: z.load_component(ffn)),
        (f"components/{ffn}/params.safetensors", lambda z: z.load_tensor(ffn, "up.weight")),
        (
            f"components/{chain.steps[0].component}/params.safetensors",
            lambda z: z.load_component(chain.steps[3].component),
        ),
        (f"deltas/{delta}/params.safetensors", lambda z: z.load_delta(delta)),
        (
            f"tokenizers/{chain.tokenizer}/tokenizer.json",
            lambda z: z.tokenizer_path(chain.tokenizer),
        ),
    )
    for name, load in loads:
        served = Zoo.open(zoo.path, verify=mode)
        load(served)
        flip(zoo.path / name)
        if mode == "never":
            load(served)
        else:
            with pytest.raises(ZooError, match="other content"):
                load(Zoo.open(zoo.path, verify=mode))
        flip(zoo.path / name)


def test_once_is_once(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from jblock.zoo import objects

    hashed = []
    check = objects.check_hash
    monkeypatch.setattr(objects, "check_hash", lambda i, h, t: (hashed.append(i), check(i, h, t)))
    ffn = zoo.chain("m").steps[1].component
    for _ in range(3):
        Zoo.open(zoo.path, verify="once").load_component(ffn)
    assert hashed == [ffn]
    os.utime(zoo.path / "components" / ffn / "params.safetensors")
    Zoo.open(zoo.path, verify="once").load_component(ffn)
    assert hashed == [ffn, ffn]
    with pytest.raises(ZooError, match="sometimes"):
        Verification("sometimes")


def test_chain_records_come_back(zoo):
    chain = zoo.chain("m")
    assert Chain.from_json(json.loads(json.dumps(chain.to_json()))) == chain
    assert np.array_equal(chain.ids, list(dict.fromkeys(chain.ids)))
