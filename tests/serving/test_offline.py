"""`LLM`: batches in this process, without a server."""

import pytest
import server_harness as harness
from test_http_answers import TEMPLATE
from tokenizer_fixtures import byte_level

from jblock import LLM
from jblock.engine.process.mock import build_engine
from serving.values import ClientError


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with LLM.of(harness.mock(folder)) as one:
        yield one


def test_many_prompts_in_their_order(llm):
    prompts = [f"number {i} says héllo" for i in range(200)]
    answers = llm.generate(prompts, model="echo", max_tokens=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.token_ids == tuple(byte_level().encode(prompt).ids[:5])
    assert llm.models == harness.MODELS


def test_one_prompt_of_text_or_ids(llm):
    (answer,) = llm.generate("hello", model="echo", max_tokens=1)
    assert answer.text == "hello" and answer.usage.completion_tokens == 1
    (answer,) = llm.generate([300, 301], model="ids", max_tokens=2, logprobs=True)
    assert (answer.token_ids, answer.logprobs) == ((301, 302), (-0.5, -0.5))
    pairs = llm.generate([[1, 2], [3]], model="ids", max_tokens=1)
    assert [a.token_ids for a in pairs] == [(2,), (4,)]
    assert llm.generate([], model="echo") == []


def test_chats(llm):
    (answer,) = llm.chat("hello", model="echo", max_tokens=8)
    assert answer.text.startswith("user: ")
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    answers = llm.chat([conversation, "hello"], model="echo", max_tokens=8)
    assert answers[0].text.startswith("system:") and answers[1].text == answer.text
    (alone,) = llm.chat(conversation, model="echo", max_tokens=8)
    assert alone.token_ids == answers[0].token_ids


def test_what_cannot_be_answered_says_which(llm):
    with pytest.raises(ClientError, match="INVALID_ARGUMENT: prompt 1: text: is empty"):
        llm.generate(["x", "", "y"], model="echo", max_tokens=1)
    with pytest.raises(ClientError, match="NOT_FOUND: prompt 0: model: 'nobody' is not served"):
        llm.generate("x", model="nobody")
    with pytest.raises(ValueError, match="model: is missing; name one of adapter, broken"):
        llm.generate("x")
    with pytest.raises(ClientError, match="ids has no chat template"):
        llm.chat("x", model="ids")
    with pytest.raises(ClientError, match=r"chat.messages\[0\].role: 'boss'"):
        llm.chat([{"role": "boss", "content": "x"}], model="echo")
    assert llm.generate("hello", model="echo", max_tokens=1)[0].text == "hello"


def test_the_only_model_needs_no_name_and_a_bar_is_shown(capsys):
    with LLM.of(build_engine()) as one:
        assert one.generate([5, 6], max_tokens=2, progress=True)[0].token_ids == (5, 6)
        assert "answers" in capsys.readouterr().err
        assert one.generate([5], max_tokens=1)[0].token_ids == (5,)
        assert capsys.readouterr().err == ""
    one.close()


def test_an_engine_that_does_not_start():
    engine = build_engine(models=[{"name": "m", "tokenizer_path": "/nowhere"}])
    with pytest.raises(ValueError, match=r"tokenizer_path: /nowhere/tokenizer.json"):
        LLM.of(engine)
