"""Sharding rules, and how sizes that do not divide are spread."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jblock.blocks.spec import AttentionSpec, FfnSpec, RopeSpec
from jblock.engine.config import EngineConfig
from jblock.engine.groups.replicas import group_config, group_placements
from jblock.parallel.axes import tensor_axes
from jblock.parallel.rules import MeshShape, ShardingRules
from jblock.parallel.spread import FILL, columns, kv_heads, query_heads, spread


def test_a_mesh_from_text():
    assert MeshShape.parse("") == MeshShape() and MeshShape.parse("").size == 1
    assert MeshShape.parse("dp=2, tp=4") == MeshShape(dp=2, tp=4)
    assert str(MeshShape.parse("tp=4,dp=2")) == "dp=2,tp=4"
    assert MeshShape.parse("ep=2,tp=2").size == 4
    assert str(MeshShape.parse("tp=2,pp=3")) == "pp=3,tp=2" and MeshShape(pp=3, tp=2).size == 6


@pytest.mark.parametrize("text", ["tp", "tp=0", "tp=2,tp=4", "xp=2", "tp=-1", "4", "tp=\u0662"])
def test_refuses_other_text(text):
    with pytest.raises(ValueError, match="mesh"):
        MeshShape.parse(text)


def test_a_data_parallel_group_has_its_share():
    config = EngineConfig(mesh="dp=2,tp=4", kv_memory_mb=101, max_num_seqs=8)
    inner = group_config(config)
    assert (inner.mesh, inner.kv_memory_mb, inner.max_num_seqs) == ("tp=4", 51, 8)
    assert group_config(EngineConfig(mesh="dp=3")).mesh == ""
    assert group_config(EngineConfig(mesh="pp=2,tp=2")).mesh == "tp=2"
    with pytest.raises(ValueError, match="needs 8 devices"):
        group_placements(config, jax.local_devices()[:1])


def test_one_mesh_axis_cannot_split_two_axes_of_an_array():
    rules = ShardingRules(mesh=MeshShape(dp=2, tp=2))
    assert rules.spec("rows", None, "heads") == (("dp",), None, ("tp",))
    experts = ShardingRules(mesh=MeshShape(ep=2, tp=2))
    assert experts.spec("experts", "expert_mlp") == (("ep",), ("tp",))
    with pytest.raises(ValueError, match=r"'experts' and 'mlp'.*'ep'"):
        experts.spec("experts", "mlp")
    with pytest.raises(ValueError, match=r"'heads' and 'mlp'.*'tp'"):
        rules.spec("heads", "mlp")
    with pytest.raises(ValueError, match="no sharding rule"):
        rules.spec("depth")
    with pytest.raises(ValueError, match="none twice"):
        ShardingRules(heads=("tp", "tp"))


def test_axes_of_one_device_split_nothing():
    assert ShardingRules().spec("heads", "rows") == (None, None)


@given(kv=st.integers(1, 12), groups=st.integers(1, 9), ways=st.integers(1, 16))
def test_every_query_head_lies_with_the_kv_head_it_reads(kv, groups, ways):
    keys, queries = kv_heads(kv, ways), query_heads(kv * groups, kv, ways)
    assert len(keys) % ways == 0 and len(queries) % len(keys) == 0
    assert sorted(q for q in queries if q != FILL) == list(range(kv * groups))
    each = len(queries) // len(keys)
    for place, query in enumerate(queries):
        assert query == FILL or keys[place // each] == query // groups
    if kv % ways == 0:
        assert len(keys) == kv and len(queries) == kv * groups


@given(size=st.integers(1, 50), ways=st.integers(1, 9))
def test_what_is_filled_up_is_zero(size, ways):
    array = np.arange(1, size + 1)
    wide = spread(array, [columns(size, ways)])
    assert len(wide) % ways == 0 and len(wide) - size < ways
    assert (wide[:size] == array).all() and not wide[size:].any()


def test_tensors_without_a_rule_are_refused():
    rules = ShardingRules(mesh=MeshShape(tp=2))
    ffn = FfnSpec(hidden_size=8, intermediate_size=6, norm_eps=1e-5)
    attention = AttentionSpec(
        hidden_size=8, num_heads=6, num_kv_heads=3, head_dim=4, norm_eps=1e-5, rope=RopeSpec()
    )
    for spec in (ffn, attention):
        for name, shape in spec.tensors().items():
            assert len(tensor_axes(spec, name, rules, len(shape))) == len(shape)
    out, inner = tensor_axes(attention, "q.weight", rules, 2)
    # Two query heads a KV head, three KV heads on two devices: each KV head lies on both.
    assert out.logical == "heads" and len(out.sources) == 6 * 4 and inner.logical is None


class Strange(FfnSpec):
    """A component that no rule was written for."""

    def tensors(self):
        return {"router.weight": (4, self.hidden_size)}


def test_a_component_without_a_rule_is_refused():
    spec = Strange(hidden_size=8, intermediate_size=6, norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"router.*--mesh"):
        tensor_axes(spec, "router.weight", ShardingRules(mesh=MeshShape(tp=2)), 2)
