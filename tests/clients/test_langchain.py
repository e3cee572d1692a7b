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


def test_tools(base_url):
    tool = {
        "type": "function",
        "function": {"name": "get", "parameters": {"properties": {"a": {"type": "integer"}}}},
    }
    model = langchain.ChatOpenAI(base_url=base_url, api_key="none", model="echo", temperature=0)
    asked = '<tool_call>{"name": "get", "arguments": {"a": 1}}</tool_call>'
    answer = model.bind_tools([tool]).bind(max_tokens=100).invoke(asked)
    assert [(c["name"], c["args"]) for c in answer.tool_calls[:1]] == [("get", {"a": 1})]


def test_embeddings(base_url):
    model = langchain.OpenAIEmbeddings(
        base_url=base_url, api_key="none", model="echo", check_embedding_ctx_length=False
    )
    one, other = model.embed_documents(["hello", "hello the cat"])
    assert len(one) == len(other) == 3 and one != other
    assert sum(x * x for x in model.embed_query("hello")) == pytest.approx(1.0)
