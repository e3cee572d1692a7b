"""The zoo: stored once by content, bit by bit, and nothing outside it is ever read or written."""

import errno
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zoos
from hypothesis import given, settings
from hypothesis import strategies as st
from zoos import EMBEDDING, FFN, HEAD, LORA, NORM

from jblock.blocks.spec import NormSpec
from jblock.zoo import codec, ids
from jblock.zoo.fsck import fsck
from jblock.zoo.records import Chain, NotFoundError, Step, ZooError
from jblock.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path):
    """An empty zoo."""
    return Zoo.create(tmp_path / "zoo")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_back_bit_by_bit(zoo, dtype):
    value = np.array([0.0, -0.0, 1.5, -65504.0]).astype(dtype)
    for one in (value, np.zeros(4, dtype), -np.zeros(4, dtype)):
        id_ = zoo.put_component(NORM, {"weight": one})
        loaded = zoo.load_component(id_, verify=True)["weight"]
        assert (loaded.dtype, loaded.tobytes()) == (one.dtype, one.tobytes())
        assert loaded.flags.writeable


def test_equal_content_is_stored_once(zoo):
    first = zoo.put_component(FFN, zoos.tensors(FFN))
    strided = {n: np.asfortranarray(t) for n, t in reversed(zoos.tensors(FFN).items())}
    assert zoo.put_component(FFN, strided) == first
    assert os.listdir(zoo.path / "components") == [first]
    other = zoo.put_component(FFN, zoos.tensors(FFN, dtype=np.float16))
    assert other != first
    # Equal bytes under another spec are another component: they compute something else.
    weight = {"weight": np.ones(4, np.float32)}
    one, two = (zoo.put_component(NormSpec(hidden_size=4, eps=e), weight) for e in (1e-5, 1e-6))
    assert one != two


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c.weight"]),
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 3)),
        max_size=3,
    ),
    st.randoms(use_true_random=False),
)
def test_ids_depend_on_content_alone(description, rng):
    tensors = {n: np.full(shape, value, np.float32) for n, (shape, value) in description.items()}
    id_ = ids.content_id({"x": 1, "y": 2}, tensors)
    shuffled = list(tensors.items())
    rng.shuffle(shuffled)
    assert ids.content_id({"y": 2, "x": 1}, dict(shuffled)) == id_
    assert ids.content_id({"x": 1}, tensors) != id_
    for name, value in tensors.items():
        assert ids.content_id({"x": 1, "y": 2}, tensors | {name: value + 1}) != id_
        assert ids.content_id({"x": 1, "y": 2}, tensors | {name: value[None]}) != id_
        rest = {n: t for n, t in tensors.items() if n != name}
        assert ids.content_id({"x": 1, "y": 2}, rest) != id_


@given(st.dictionaries(st.text(max_size=3), st.binary(max_size=5), max_size=4))
def test_file_ids_do_not_run_together(files):
    id_ = ids.files_id(files)
    assert ids.files_id(dict(reversed(files.items()))) == id_
    assert ids.files_id(files | {"extra": b""}) != id_ or "extra" in files
    for name, data in files.items():
        assert ids.files_id(files | {name: data + b"\0"}) != id_


def test_tied_tensors_are_references(zoo):
    tensors = zoos.tensors(EMBEDDING)
    embedding = zoo.put_component(EMBEDDING, tensors)
    head = zoo.put_component(HEAD, {}, {"weight": (embedding, "weight")})
    assert zoo.component(head).nbytes == 0
    assert (zoo.load_component(head, verify=True)["weight"] == tensors["weight"]).all()
    assert head != zoo.put_component(HEAD, tensors)


@pytest.mark.parametrize(
    ("spec", "tensors", "refs"),
    [
        (NORM, {}, {}),
        (NORM, {"weight": np.ones(5, np.float32)}, {}),
        (NORM, {"weight": np.ones(4, np.float32), "bias": np.ones(4, np.float32)}, {}),
        (NORM, {"weight": np.ones(4, np.float64)}, {}),
        (NORM, {"weight": np.ones(4, np.int8)}, {}),
        (HEAD, {}, {"weight": ("0" * 64, "weight")}),
        (HEAD, {}, {"weight": ("../x", "weight")}),
    ],
)
def test_what_does_not_fit_is_refused(zoo, spec, tensors, refs):
    with pytest.raises(ZooError):
        zoo.put_component(spec, tensors, refs)
    assert os.listdir(zoo.path / "components") == []
    assert os.listdir(zoo.path / "tmp") == []


def test_references_must_fit_their_spec(zoo):
    norm = zoo.put_component(NORM, zoos.tensors(NORM))
    with pytest.raises(ZooError, match="shape"):
        zoo.put_component(HEAD, {}, {"weight": (norm, "weight")})
    with pytest.raises(ZooError, match="owns no such"):
        zoo.put_component(HEAD, {}, {"weight": (norm, "bias")})


def test_deltas_belong_to_a_component(zoo):
    ffn = zoo.put_component(FFN, zoos.tensors(FFN))
    other = zoo.put_component(FFN, zoos.tensors(FFN, seed=1))
    delta = zoo.put_delta(LORA, ffn, zoos.lora_tensors())
    assert (zoo.delta(delta).component, zoo.delta(delta).spec) == (ffn, LORA)
    assert zoo.put_delta(LORA, other, zoos.lora_tensors()) != delta
    loaded = zoo.load_delta(delta, verify=True)
    assert all((loaded[n] == t).all() for n, t in zoos.lora_tensors().items())
    bad = zoos.lora_tensors() | {"up.a": np.ones((3, 4), np.float32)}
    with pytest.raises(ZooError, match=r"up\.a"):
        zoo.put_delta(LORA, ffn, bad)
    chain = zoos.fill(zoo)
    steps = (Step(component=other, deltas=(delta,)), *chain.steps[1:])
    with pytest.raises(ZooError, match="another component"):
        zoo.publish(Chain(**{**vars(chain), "steps": steps}))


def test_chains_have_versions(zoo):
    first = zoos.fill(zoo)
    assert first.version == 1
    assert zoos.fill(zoo) == first
    second = zoos.fill(zoo, seed=1)
    assert (second.version, zoo.chain("m"), zoo.chain("m", 1)) == (2, second, first)
    assert zoo.publish(first) == first
    assert (zoo.active("m"), zoo.versions("m")) == (1, [1, 2])
    assert zoos.fill(zoo, name="n").version == 1
    assert zoo.chains() == ["m", "n"]
    for name, version, known in (("x", None, "known: m, n"), ("m", 3, "m@3: .* known: 1, 2$")):
        with pytest.raises(ZooError, match=known):
            zoo.chain(name, version)


@pytest.mark.parametrize("first", ["model.json", "1.json"])
def test_a_model_removed_while_it_is_read_is_gone_and_no_damage(zoo, monkeypatch, first):
    zoos.fill(zoo)
    read = codec.read_file

    def removed_first(path, limit):
        if path.name == first:
            shutil.rmtree(path.parent, ignore_errors=True)
        return read(path, limit)

    monkeypatch.setattr(codec, "read_file", removed_first)
    with pytest.raises(NotFoundError, match="no model 'm"):
        zoo.chain("m")


@pytest.mark.parametrize("what", ["spec.json", "params.safetensors"])
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_component_removed_while_it_is_read_is_gone_and_no_damage(
    zoo, tmp_path, monkeypatch, what, comes_back
):
    id_ = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN))
    folder = zoo.folder("components", id_)

    def removed_first(path):
        if path.name == what and not (tmp_path / "away").exists():
            os.rename(folder, tmp_path / "away")
            if comes_back:
                folder.mkdir()  # as another writer adds it, who has got no further

    opened = os.open

    def open_(path, *args, **kwargs):
        removed_first(Path(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(NotFoundError, match=f"no component {id_} any more: it was removed"):
        zoo.load_component(id_)


def test_a_component_that_lacks_a_file_is_damaged(zoo):
    tensors = zoos.tensors(zoos.FFN)
    id_ = zoo.put_component(zoos.FFN, tensors)
    (zoo.folder("components", id_) / "params.safetensors").unlink()
    with pytest.raises(ZooError, match="the zoo is damaged") as caught:
        zoo.load_component(id_)
    assert not isinstance(caught.value, NotFoundError)


def test_a_chain_names_only_what_is_there(zoo):
    chain = zoos.fill(zoo)
    for change in (
        {"steps": (Step(component="0" * 64),)},
        {"steps": (Step(component=chain.steps[0].component, deltas=("0" * 64,)),)},
        {"tokenizer": "0" * 64},
        {"source_files": "../../etc"},
        {"name": "../x"},
    ):
        with pytest.raises(ZooError):
            zoo.publish(Chain(**{**vars(chain), **change}))
    assert zoo.chains() == ["m"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_position": -1},
        {"max_position": True},
        {"vocab_size": 10**12},
        {"vocab_size": "32"},
        {"eos_token_ids": [-1]},
        {"eos_token_ids": [10**6]},
    ],
)
def test_a_record_with_numbers_of_no_model_is_not_served(zoo, change):
    chain = zoos.fill(zoo)
    with pytest.raises(ZooError, match=next(iter(change))):
        Chain.from_json(chain.to_json() | change)


@pytest.mark.parametrize("id_", ["", ".", "..", "../chains", "/etc", "0" * 63, "G" * 64, "A" * 64])
def test_ids_are_no_paths(zoo, id_):
    for call in (zoo.component, zoo.load_component, zoo.delta, zoo.load_delta, zoo.tokenizer_path):
        with pytest.raises(ZooError):
            call(id_)


@pytest.mark.parametrize("name", ["..", "../m", "/m", "m/../m", ""])
def test_names_are_no_paths(zoo, name):
    zoos.fill(zoo)
    with pytest.raises(ZooError):
        zoo.chain(name)


def test_links_out_of_the_zoo_are_not_followed(zoo, tmp_path):
    chain = zoos.fill(zoo)
    ffn = chain.steps[1].component
    folder = zoo.path / "components" / ffn
    for part in (
        folder,
        folder / "params.safetensors",
        folder / "spec.json",
    ):
        outside = tmp_path / "outside"
        part.rename(outside)
        part.symlink_to(outside)
        with pytest.raises(ZooError):
            zoo.load_component(ffn)
        assert fsck(zoo)
        part.unlink()
        outside.rename(part)
    for part in ("chains/m/1.json", "chains/m", f"tokenizers/{chain.tokenizer}"):
        (zoo.path / part).rename(tmp_path / "outside")
        (zoo.path / part).symlink_to(tmp_path / "outside")
        with pytest.raises(ZooError):
            zoo.chain("m")
            zoo.tokenizer_path(chain.tokenizer)
        (zoo.path / part).unlink()
        (tmp_path / "outside").rename(zoo.path / part)
    assert fsck(zoo) == []


def test_open_refuses_what_is_no_zoo(tmp_path, zoo):
    with pytest.raises(ZooError, match="not a zoo"):
        Zoo.open(tmp_path)
    with pytest.raises(ZooError, match="not a zoo"):
        Zoo.open(tmp_path / "nowhere")
    (zoo.path / "zoo.json").write_text('{"format": 99}')
    with pytest.raises(ZooError, match="99"):
        Zoo.open(zoo.path)


def test_a_half_made_zoo_is_finished(tmp_path):
    (tmp_path / "zoo" / "components").mkdir(parents=True)
    (tmp_path / "zoo" / "tmp").mkdir()
    assert Zoo.create(tmp_path / "zoo").chains() == []


def test_a_full_disk_leaves_nothing_behind(zoo, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ZooError, match="no space left"):
        zoo.put_component(NORM, zoos.tensors(NORM))
    assert os.listdir(zoo.path / "components") == []
    assert os.listdir(zoo.path / "tmp") == []


def test_a_living_writer_keeps_its_scratch_folder(zoo):
    with zoo.writer() as one:
        one.put_component(NORM, zoos.tensors(NORM))
        zoos.fill(zoo)  # another writer, which sweeps before it starts
        assert fsck(zoo) == []
        one.put_component(FFN, zoos.tensors(FFN, seed=3))
    assert fsck(zoo) == []
    assert os.listdir(zoo.path / "tmp") == []


def test_a_zoo_can_be_moved(zoo, tmp_path):
    chain = zoos.fill(zoo)
    shutil.move(zoo.path, tmp_path / "moved")
    assert Zoo.open(tmp_path / "moved").chain("m") == chain
