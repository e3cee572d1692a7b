"""Messages come out of the wire as they went in, tuples in tuples too."""

import pytest

from jblock.engine import api
from jblock.engine.process import wire

SAMPLING = api.SamplingParams(
    temperature=0.5,
    min_p=0.1,
    logit_bias=((4, 1.5), (9, -100.0)),
    seed=2**32 - 1,
    stop_token_ids=(1, 2),
    top_logprobs=2,
    prompt_logprobs=True,
)
MESSAGES = [
    api.Request(request_id="r", model="m", token_ids=(1, 2), sampling=SAMPLING, cache_salt="s"),
    api.Request(request_id="r", model="m", token_ids=(1,), generated=(4, 5)),
    api.Output(
        request_id="r",
        token_ids=(5, 6),
        logprobs=(-0.5, -1.5),
        top_logprobs=(((5, -0.5), (7, -0.75)), ((6, -1.5), (8, -2.0))),
        prompt_logprobs=(-0.25,),
        finish_reason="length",
    ),
    api.Output(request_id="r"),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_out_as_it_went_in(message):
    if isinstance(message, api.Request):
        out = wire.for_child(wire.pack(wire.Submit(message))).request
    else:
        (out,) = wire.for_parent(wire.pack(wire.Step((message,)))).outputs
    assert out == message and hash(out) == hash(message)


@pytest.mark.parametrize(
    "frame",
    [
        wire.Start("a:b", {"models": [{"name": "m", "eos_token_ids": [1]}], "x": None}, 2.5),
        wire.Cancel("r"),
        wire.Serve(3, ("a", "b@2")),
        wire.Close(),
    ],
    ids=lambda f: type(f).__name__,
)
def test_a_frame_reaches_the_child(frame):
    assert wire.for_child(wire.pack(frame)) == frame


@pytest.mark.parametrize(
    "frame",
    [
        wire.Models(
            (api.ModelInfo(name="m", version=3, family="f", vocab_size=9, max_model_len=7),)
        ),
        wire.Served(3, refused="invalid", message="words"),
        wire.Step((), wire.pack_stats(api.EngineStats(steps=2**40, pages_free=3))),
        wire.Running(("a",), ("b", "c")),
        wire.Beat(),
        wire.Invalid("words"),
        wire.Died("words"),
    ],
    ids=lambda f: type(f).__name__,
)
def test_a_frame_reaches_the_parent(frame):
    assert wire.for_parent(wire.pack(frame)) == frame


def test_counters_come_out_as_they_went_in_when_somebody_looks():
    stats = api.EngineStats(steps=2**40, tenants=(api.TenantStats(tenant="t", waiting=1),))
    frame = wire.for_parent(wire.pack(wire.Step((), wire.pack_stats(stats))))
    assert wire.unpack_stats(frame.stats) == stats
    with pytest.raises(ValueError, match="must run the same version"):
        wire.unpack_stats(wire.pack(wire.Beat()))


def test_a_frame_for_the_other_side_is_refused():
    with pytest.raises(ValueError, match="must run the same version"):
        wire.for_child(wire.pack(wire.Beat()))
    with pytest.raises(ValueError, match="must run the same version"):
        wire.for_parent(wire.pack(wire.Close()))


def test_a_field_of_another_type_is_refused():
    frame = wire.pack(wire.Submit(api.Request(request_id="r", model="m", token_ids=("x",))))
    with pytest.raises(ValueError, match="Expected `int`"):
        wire.for_child(frame)
