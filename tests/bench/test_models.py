"""The zoo in memory: shapes, what fine-tunes share, and that an engine and a zoo on disk take it."""

import numpy as np
import pytest

from bench.models import DEMO_3M, MODEL_250M, TINY, MemoryZoo, fine_tunes, save
from jblock.zoo.partition import plan_blocks
from jblock.zoo.store import Zoo


def parameters(zoo: MemoryZoo, name: str) -> int:
    components = {step.component for step in zoo.chain(name).steps}
    return sum(zoo.component(c).nbytes // 4 for c in components)


@pytest.mark.parametrize(("shape", "millions"), [(MODEL_250M, 254), (DEMO_3M, 2.96)])
def test_models_have_the_size_they_are_named_for(shape, millions):
    zoo = MemoryZoo(shape)
    zoo.add_base()
    assert parameters(zoo, "base") == pytest.approx(millions * 1e6, rel=0.01)
    weights = shape.layers * shape.layer_weights + 2 * shape.head_weights
    assert parameters(zoo, "base") == pytest.approx(weights, rel=0.001)


def test_fine_tunes_share_all_but_their_last_layers():
    zoo = fine_tunes(MODEL_250M, 8, 4)
    assert zoo.chains() == [f"tune-{i}" for i in range(8)]
    ids = [[step.component for step in zoo.chain(name).steps] for name in zoo.chains()]
    common = set.intersection(*map(set, ids))
    # Embedding, norm, unembedding, and attention and ffn of twelve layers.
    assert len(common) == 3 + 24
    assert all(ids[0][1 + i] in common for i in range(24))
    cut = plan_blocks(zoo.served).blocks
    assert [len(block.components) for block in cut["tune-3"]] == [1, 24, 8, 2]


def test_weights_are_drawn_again_the_same_and_differ_between_components():
    zoo = fine_tunes(TINY, 2, 1)
    (a, b) = (zoo.chain(name).steps[-4].component for name in zoo.chains())
    first = zoo.load_component(a)
    assert all((first[n] == t).all() for n, t in zoo.load_component(a).items())
    assert not (first["q.weight"] == zoo.load_component(b)["q.weight"]).any()
    assert first["q.weight"].std() == pytest.approx(TINY.hidden_size**-0.5, rel=0.05)
    assert {n: t.shape for n, t in first.items()} == zoo.component(a).spec.tensors()


def test_a_new_version_has_other_weights_where_it_has_its_own():
    zoo = fine_tunes(TINY, 2, 1)
    old, new = zoo.chain("tune-1"), zoo.retune("tune-1")
    assert zoo.versions("tune-1") == [1, 2]
    assert zoo.chain("tune-1", 1) == old
    assert zoo.chain("tune-1") == new
    differing = [i for i, (a, b) in enumerate(zip(old.steps, new.steps, strict=True)) if a != b]
    assert differing == [7, 8]


def test_adapters_ride_on_the_components_of_their_base():
    zoo = MemoryZoo(TINY)
    base, adapted = zoo.add_base(), zoo.add_adapter("lora", "base", 8, ("q", "down"))
    assert [s.component for s in base.steps] == [s.component for s in adapted.steps]
    deltas = [d for step in adapted.steps for d in step.deltas]
    assert len(deltas) == 2 * TINY.layers
    tensors = zoo.load_delta(deltas[0])
    assert tensors["q.a"].shape == (8, TINY.hidden_size)
    assert zoo.delta(deltas[0]).component == base.steps[1].component


def test_a_zoo_on_disk_holds_the_same(tmp_path):
    memory = fine_tunes(TINY, 2, 1)
    store = Zoo.open(save(memory, tmp_path / "zoo"))
    assert store.chains() == memory.chains()
    for name in store.chains():
        for here, there in zip(store.chain(name).steps, memory.chain(name).steps, strict=True):
            tensors = memory.load_component(there.component)
            for tensor, values in store.load_component(here.component, verify=True).items():
                np.testing.assert_array_equal(values, tensors[tensor])
