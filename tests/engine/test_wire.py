"""Messages come out of the wire as they went in, tuples in tuples too."""

import dataclasses

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
    api.Request(request_id="r", model="m", token_ids=(1,)),
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
    kind, body = wire.unpack(wire.pack("kind", wire.to_plain(message)))
    assert kind == "kind"
    out = wire.from_plain(type(message), body)
    assert out == message and hash(out) == hash(message)
    assert set(body) <= {f.name for f in dataclasses.fields(message)}
