"""One donated pool goes through all layers of a program without a copy, whatever it is compiled for."""

import dataclasses
import importlib.util
import re

import pytest

from bench.models import MemoryZoo, ModelShape
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.programs import needed
from jblock.engine.programs.keys import ProgramKey
from jblock.engine.runner.runner import Runner
from jblock.engine.weights.params import abstract_params
from jblock.parallel.placement import Placement
from jblock.parallel.targets import Target

SHAPE = ModelShape(
    layers=16,
    hidden_size=256,
    intermediate_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=256,
)


def copies(text: str, shapes) -> list[str]:
    """Instructions of a compiled program that copy or convert an array of one of these shapes."""
    forms = "|".join(re.escape(f"[{','.join(map(str, s.shape))}]") for s in shapes)
    pattern = re.compile(rf"= \S*(?:{forms})\S* (?:copy|copy-start|convert|transpose)\(")
    return [line.strip() for line in text.splitlines() if pattern.search(line)]


def check(placement: Placement, kv_dtype: str, q_len: int) -> None:
    config = EngineConfig(kv_memory_mb=200, kv_dtype=kv_dtype, page_size=64)
    zoo = MemoryZoo(SHAPE)
    graph = assemble(zoo, {"base": zoo.add_base()}, config, placement=placement)
    device = Runner(graph, config, placement=placement)
    (pool,) = device.pool_shapes.values()
    segment = max((s for i in graph.instances for s in i.segments), key=lambda s: len(s.layers))
    assert segment.kv_layers == 16
    bucket = Bucket(8 if q_len == 1 else 1, q_len)
    key = needed.layer_key(segment.layers, bucket, device.pool_shapes)
    program = device.executables.lower(key).compile()
    arrays = pool.abstract_arrays(placement)
    nbytes = sum(a.size * a.dtype.itemsize for a in arrays)
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= nbytes
    assert analysis.temp_size_in_bytes < nbytes // 4
    assert not copies(program.as_text(), arrays)


@pytest.mark.parametrize(
    ("kv_dtype", "q_len"),
    [
        ("float32", 16),
        ("bfloat16", 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("float32", 1), ("bfloat16", 16), ("int8", 1), ("int8", 16))
        ),
    ],
)
def test_on_cpu(kv_dtype, q_len):
    check(Placement(), kv_dtype, q_len)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_bfloat16_is_widened_page_by_page_alone(backend):
    """XLA's CPU compiler widens the whole of an array of bfloat16 that something is scattered into."""
    config = EngineConfig(kv_memory_mb=20, kv_dtype="bfloat16", page_size=64)
    zoo = MemoryZoo(dataclasses.replace(SHAPE, layers=1))
    device = Runner(assemble(zoo, {"base": zoo.add_base()}, config), config)
    (pool,) = device.pool_shapes.values()
    pool = dataclasses.replace(pool, backend=backend)
    arrays = pool.abstract_arrays()
    for kind in ("zero_pages", "gather_pages", "scatter_pages"):
        program = device.executables.lower(ProgramKey(kind=kind, pool=pool)).compile()
        assert not copies(program.as_text(), arrays), kind
        assert program.memory_analysis().temp_size_in_bytes < 10**6


def test_an_embedding_of_bfloat16_is_read_in_place_and_held_once():
    config = EngineConfig(kv_memory_mb=20, dtype="bfloat16")
    zoo = MemoryZoo(dataclasses.replace(SHAPE, layers=1, tied=True))
    graph = assemble(zoo, {"base": zoo.add_base()}, config)
    layers = [layer for i in graph.instances for layer in i.layers]
    (embedding,) = (layer for layer in layers if layer.kind == "embedding")
    key = needed.layer_key((embedding,), Bucket(4, 1), {})
    program = Runner(graph, config).executables.lower(key).compile()
    (table,) = abstract_params(embedding.signature)[0].values()
    assert table.dtype == "bfloat16" and not copies(program.as_text(), [table])
    # Where a head reads the table as it lies, it is the same one.
    (head,) = (layer for layer in layers if layer.kind == "head")
    assert head.signature.tied == graph.placement.platform.out_in


@pytest.mark.parametrize("target", ["tpu:v5e:1x1", "cuda:h200"])
@pytest.mark.parametrize("q_len", [1, 16])
def test_on_a_target_that_is_not_here(target, q_len):
    package = "libtpu" if target.startswith("tpu") else "jax_cuda13_plugin"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -e '.[compile]'")
    devices = Target.parse(target).devices()
    placement = Placement.on(EngineConfig().sharding, devices, abstract=True)
    check(placement, "bfloat16", q_len)
