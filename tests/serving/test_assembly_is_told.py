"""An answer by other blocks than its model's own says so, in every protocol."""

from jblock.engine import api
from serving.answers import Answer, Usage
from serving.chat.tool_calls import Parser
from serving.http.usage import note_bound
from serving.messages import to_bytes
from serving.text import TextStream
from serving.v1 import jblock_pb2 as pb
from serving.values import Assembly, to_chunk

BOUND = api.Bound(served_as="m+0123456789ab", policy="near", measure="kl", damage=0.03)


def parts():
    """Of an answer of two tokens."""
    info = api.ModelInfo(name="m", version=2, family="llama", vocab_size=8, max_model_len=16)
    answer = Answer(0, None, TextStream(None, (), 0), Parser(), info, (1,))
    first = api.Output(request_id="r", token_ids=(3,), bound=BOUND)
    rest = api.Output(request_id="r", token_ids=(4,))
    return [answer.part(output, Usage(), False) for output in (first, rest)]


def test_grpc():
    first, rest = (pb.GenerateStreamResponse.FromString(to_bytes(p)) for p in parts())
    assert (first.assembly.served_as, first.assembly.damage) == ("m+0123456789ab", 0.03)
    assert [m.model for m in (first, rest)] == ["m", "m"]
    assert [m.policy for m in (first, rest)] == [pb.POLICY_NEAR] * 2
    assert not rest.HasField("assembly")
    assert to_chunk(first).assembly == Assembly(
        served_as="m+0123456789ab", measure="kl", damage=0.03
    )
    assert to_chunk(rest).assembly is None


def test_http():
    head = {"policy": "exact"}
    for part in parts():
        note_bound(head, part)
    assert head["policy"] == "near"
    assert head["assembly"] == {"served_as": "m+0123456789ab", "measure": "kl", "damage": 0.03}
