"""`langchain-openai` as it is published."""

import pytest

langchain = pytest.importorskip("langchain_openai")
pytestmark = pytest.mark.clients


def test_a_chat_whole_and_in_parts(base_url):
    model = langchain.ChatOpenAI(
        base_url=base_url, api_key="none", model="echo", temperature=0, max_tokens=10
    )
    whole = model.invoke("hello the cat")
    assert whole.content.startswith("user: hello")
    assert "".join(chunk.content for chunk in model.stream("hello the cat")) == whole.content
    assert whole.usage_metadata["output_tokens"] == 10


def test_a_completion(base_url):
    model = langchain.OpenAI(
        base_url=base_url, api_key="none", model="echo", temperature=0, max_tokens=4
    )
    assert model.invoke("hello the cat") == "hello the cathello"
