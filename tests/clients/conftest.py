"""A server for clients of others: the mock engine, which echoes prompts, behind every protocol."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))
import server_harness as harness

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    config = {"chat_template": TEMPLATE, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    engine = harness.mock(folder, step_delay=0.001)
    with harness.serving(engine, http_port=0) as one:
        yield one
        assert harness.eventually(one.is_empty)


@pytest.fixture(scope="module")
def base_url(running):
    return f"http://127.0.0.1:{running.server.http_port}/v1"
