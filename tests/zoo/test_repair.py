"""fsck --repair: derived records are written anew, damage is set aside and can be made again."""

import pytest
import zoos

from jblock.zoo.fsck import fsck
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo


@pytest.fixture
def zoo(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    return zoo


def test_a_sound_zoo_stays_as_it_is(zoo):
    assert repair(zoo) == []
    assert fsck(zoo) == []


@pytest.mark.parametrize(
    "file",
    [
        "components/{c}/params/up.weight/0.0",
        "components/{c}/spec.json",
        "deltas/{d}/spec.json",
        "tokenizers/{t}/merges.txt",
    ],
)
def test_damage_is_set_aside_and_made_again(zoo, file):
    chain = zoo.chain("m")
    step = chain.steps[1]
    path = file.format(c=step.component, d=step.deltas[0], t=chain.tokenizer)
    (zoo.path / path).write_bytes(b"{")
    assert fsck(zoo) != []
    (done,) = repair(zoo)
    assert "convert one of m@1 again" in done
    assert len(list((zoo.path / "damaged").iterdir())) == 1
    assert zoos.fill(zoo) == chain
    assert fsck(zoo) == []


def test_damage_that_nothing_uses(zoo):
    loose = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, seed=9))
    (zoo.path / "components" / loose / "params" / "up.weight" / "0.0").write_bytes(b"")
    (done,) = repair(zoo)
    assert "nothing lacks it" in done
    assert fsck(zoo) == []


@pytest.mark.parametrize("text", ["", "x", "99\n"])
def test_the_newest_sound_version_goes_live(zoo, text):
    zoos.fill(zoo, seed=1)
    zoos.fill(zoo, seed=2)
    (zoo.path / "chains" / "m" / "3.json").write_text("{}")
    (zoo.path / "chains" / "m" / "current").write_text(text)
    (zoo.path / "partition" / "current.json").write_text("?")
    assert repair(zoo) == ["m: its live version was not named; now it is 2"]
    assert zoo.current("m") == 2
    assert len(fsck(zoo)) == 1  # version 3 is lost
