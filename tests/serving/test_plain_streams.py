"""Tokens of streams that bring nothing but text take the short way, and say the same as by the long one."""

import http_harness
import pytest
import server_harness as harness
from server_harness import mock

from serving import answers

PROMPT = [5, 6, 7, 8, 9]
TOKENS = 40


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Tokens far enough apart to come one at a time."""
    engine = mock(tmp_path_factory.mktemp("plain"), step_delay=0.005)
    with harness.serving(engine, http_port=0) as found:
        yield found


@pytest.fixture
def parts(monkeypatch):
    """Of each part that was made whole, the ids."""
    made, original = [], answers.Answer.part

    def part(self, output, *args):
        made.append(output.token_ids)
        return original(self, output, *args)

    monkeypatch.setattr(answers.Answer, "part", part)
    return made


def over_grpc(running, **options):
    """The ids of all chunks, how many chunks there were, and what the last says was used."""
    chunks = list(running.client.stream("echo", PROMPT, max_tokens=TOKENS, **options))
    usage = {"completion_tokens": chunks[-1].usage.completion_tokens}
    return [i for c in chunks for i in c.token_ids], len(chunks), usage


def over_http(running, **options):
    """The text of all events, how many events there were, and what the last says was used."""
    body = {"model": "echo", "prompt": PROMPT, "max_tokens": TOKENS, "stream": True, **options}
    body["stream_options"] = {"include_usage": True}
    answer = http_harness.ask(running.server.http_port, "/v1/completions", body)
    *events, last = answer.events
    return "".join(c["text"] for e in events for c in e["choices"]), len(events), last["usage"]


def short(parts, over, running):
    """Streams until most tokens took the short way, as they do where the machine keeps up; each must say the
    same."""
    found = None
    for _ in range(10):
        parts.clear()
        said, count, usage = over(running)
        assert usage["completion_tokens"] == TOKENS and said == (found or said)
        found = said
        if count > TOKENS // 2 and len(parts) < count // 3:
            return said
    pytest.fail(f"of {TOKENS} tokens in {count} messages {len(parts)} were made whole, ten times")


def test_grpc(running, parts):
    ids = short(parts, over_grpc, running)
    assert ids == PROMPT * (TOKENS // len(PROMPT))
    parts.clear()
    # Stop strings look at what comes: each part is made.
    assert over_grpc(running, stop=["never"])[0] == ids
    assert sum(map(len, parts)) == TOKENS


def test_http(running, parts):
    text = short(parts, over_http, running)
    for option in ({"logprobs": 1}, {"stop": "never"}):
        parts.clear()
        assert over_http(running, **option)[0] == text
        assert sum(map(len, parts)) == TOKENS
