"""`guidellm` as it is published: its command, against the server."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not importlib.util.find_spec("guidellm"), reason="guidellm is not there"),
]
# Prompts are made of the words of a tokenizer; which one does not matter.
TOKENIZER = Path(__file__).parent.parent.parent / "examples" / "models" / "demo-1m"


def test_a_benchmark(running, tmp_path):
    options = {
        "backend": f"kind=openai_http,target=http://127.0.0.1:{running.server.http_port},model=echo",
        "profile": "kind=concurrent,streams=4",
        "constraint": "kind=max_requests,count=8",
        "tokenizer": f"kind=huggingface_auto,model={TOKENIZER}",
        "data": "kind=synthetic_text,prompt_tokens=16,output_tokens=12",
        "output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    command = str(Path(sys.executable).parent / "guidellm")
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [command, "run", *flags, "--disable-console"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    made = benchmark["scheduler_metrics"]["requests_made"]
    assert (made["successful"], made["errored"], made["total"]) == (8, 0, 8)
    assert all(r["output_tokens"] == 12 for r in benchmark["requests"]["successful"])
