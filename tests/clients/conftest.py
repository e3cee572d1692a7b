"""A server for clients of others: the mock engine, which echoes prompts, behind every protocol."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))
import server_harness as harness

DEMO = Path(__file__).parent.parent.parent / "examples" / "models" / "demo-1m"
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


@pytest.fixture(scope="session")
def real_url(tmp_path_factory):
    """The API of a server with the engine and a small model, for what the mock cannot show."""
    from checkpoints import hf
    from checkpoints.progress import Progress
    from jblock.engine.process.client import ProcessEngine

    folder = tmp_path_factory.mktemp("real")
    hf.convert(DEMO, folder / "zoo", "demo", Progress(False, quiet=True))
    settings = {"max_num_seqs": 4, "max_model_len": 256, "decode_sizes": [4]}
    settings |= {"page_size": 16, "prefill_grids": [[4, 16]], "kv_memory_mb": 4}
    kwargs = {"zoo": str(folder / "zoo"), "executable_cache": str(folder / "programs")}
    engine = ProcessEngine("jblock.engine.factory:build_engine", {**kwargs, **settings})
    engine.models()
    with harness.serving(engine, http_port=0) as one:
        yield f"http://127.0.0.1:{one.server.http_port}/v1"
