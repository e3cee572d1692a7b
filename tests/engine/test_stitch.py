"""A chain through two register widths: a stitch between the layers of two models, in the engine."""

import dataclasses

import numpy as np
import pytest
from harness import Agent

from jblock.adapt import forward
from jblock.blocks.rope_spec import RopeSpec
from jblock.blocks.spec import (
    AttentionSpec,
    EmbeddingSpec,
    FfnSpec,
    NormSpec,
    SpecError,
    StitchSpec,
    UnembeddingSpec,
)
from jblock.engine.config import EngineConfig
from jblock.zoo.records import Chain, Step
from jblock.zoo.store import Zoo

VOCAB = 32
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=64,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=4,
)


def put(zoo, spec, seed):
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in spec.tensors().items():
        scale = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        tensors[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return Step(component=zoo.put_component(spec, tensors))


def model(zoo, width, layers, seed):
    """Steps of a random model."""
    attention = AttentionSpec(
        hidden_size=width,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        norm_eps=1e-5,
        rope=RopeSpec(theta=1e4),
    )
    ffn = FfnSpec(hidden_size=width, intermediate_size=2 * width, norm_eps=1e-5)
    steps = [put(zoo, EmbeddingSpec(vocab_size=VOCAB, hidden_size=width), seed)]
    for layer in range(layers):
        steps += [put(zoo, attention, seed + layer), put(zoo, ffn, seed + layer)]
    steps.append(put(zoo, NormSpec(hidden_size=width, eps=1e-5), seed))
    return [*steps, put(zoo, UnembeddingSpec(vocab_size=VOCAB, hidden_size=width), seed + 9)]


def publish(zoo, name, steps):
    return zoo.publish(
        Chain(
            name=name,
            family="llama",
            steps=tuple(steps),
            tokenizer=None,
            max_position=64,
            vocab_size=VOCAB,
            policy="adaptive",
        )
    )


@pytest.fixture(
    scope="module",
    params=[24, pytest.param(16, marks=pytest.mark.long)],
    ids=["two widths", "one width"],
)
def stitched(request, tmp_path_factory):
    """Both parents, and two chains that use one stitch at different depths."""
    zoo = Zoo.create(tmp_path_factory.mktemp("stitched") / "zoo")
    small, large = model(zoo, 16, 2, 1), model(zoo, request.param, 3, 50)
    spec = StitchSpec(
        hidden_size=16, output_size=request.param, inner_size=8, depths=(1, 2), norm_eps=1e-5
    )
    stitch = put(zoo, spec, 99)
    publish(zoo, "small", small)
    publish(zoo, "large", large)
    publish(zoo, "early", [*small[:3], stitch, *large[3:]])
    publish(zoo, "late", [*small[:5], stitch, *large[5:]])
    return zoo


def test_the_engine_computes_what_the_blocks_say_whatever_rides_along(stitched):
    names = ["small", "large", "early", "late"]
    agent = Agent.make(stitched.path, names, CONFIG)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 21)
    tokens = agent.generate({n: (n, prompt) for n in names}, max_tokens=12)
    seen = 0
    for name in names:
        weights = forward.load(stitched, stitched.chain(name).steps)
        ids = np.concatenate([prompt, tokens[name]])
        _, expected = forward.outputs(weights, ids[None])
        for batch, logits in agent.device.seen:
            for i, item in enumerate(batch.items):
                if item.sequence.request.request_id == name:
                    at = item.start + item.q_len - 1
                    if at >= len(prompt) - 1:
                        np.testing.assert_allclose(logits[i], expected[0, at], atol=1e-4, rtol=0)
                        seen += 1
    assert seen == 4 * 12
    # Served alone, each gives the same: nothing of another chain's rows is left in a register.
    alone = Agent.make(stitched.path, ["late"], CONFIG)
    assert alone.generate({"late": ("late", prompt)}, max_tokens=12)["late"] == tokens["late"]


def test_one_stitch_is_on_the_device_once_and_is_one_program(stitched):
    agent = Agent.make(stitched.path, ["early", "late"], CONFIG)
    stages = [s for r in agent.graph.routes.values() for s in r.stages if s.positions]
    assert sorted(s.positions for s in stages) == [(0,), (1,)]
    stitches = [u for s in stages for u in s.instance.layers if u.signature.kind == "stitch"]
    assert stitches[0].weights[0] is stitches[1].weights[0]
    bucket = CONFIG.decode_buckets[0]
    assert len({agent.device.layer_key(u, bucket) for u in stitches}) == 1


def test_a_stitch_where_it_was_not_trained_and_widths_that_do_not_meet_are_refused(stitched):
    small, large = stitched.chain("small").steps, stitched.chain("large").steps
    stitch = stitched.chain("early").steps[3]
    publish(stitched, "nowhere", [*small[:1], stitch, *large[1:]])
    with pytest.raises(SpecError, match="behind 0 layers"):
        Agent.make(stitched.path, ["nowhere"], CONFIG)
    if stitched.component(stitch.component).spec.output_size != 16:
        with pytest.raises(ValueError, match="torn"):
            publish(stitched, "torn", [*small[:3], *large[3:]])


@pytest.mark.parametrize("depths", [(), (2, 1), (1, 1), (-1,)])
def test_depths_are_checked(depths):
    fields = dict(hidden_size=4, output_size=4, inner_size=4, norm_eps=1e-5)
    with pytest.raises(SpecError, match="depths"):
        StitchSpec(depths=depths, **fields)
    assert dataclasses.asdict(StitchSpec(depths=(1,), **fields))["depths"] == (1,)
