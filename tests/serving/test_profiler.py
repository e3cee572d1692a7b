"""An XLA profiler session attaches to a running server, and its trace names steps and blocks."""

import os
import pathlib
import re
import subprocess
import sys
import threading

import grpc
import pytest
from google.protobuf.internal.encoder import _VarintBytes as varint
from server_harness import free_port

from checkpoints import hf
from checkpoints.progress import Progress
from serving.client import Client

ROOT = pathlib.Path(__file__).parent.parent.parent
FIXTURE = ROOT / "tests" / "fixtures" / "hf" / "llama_gqa_untied"


def profile_request(folder: str, milliseconds: int) -> bytes:
    """A tensorflow.ProfileRequest by hand; its proto is in no package we depend on."""

    def number(field: int, value: int) -> bytes:
        return varint(field << 3) + varint(value)

    def data(field: int, value: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(value)) + value

    # ProfileOptions: version, and the host tracer at the level of user annotations.
    options = number(5, 1) + number(2, 2) + number(9, milliseconds)
    return (
        number(1, milliseconds)
        + data(4, options)
        + data(5, folder.encode())
        + data(6, b"session")
        + data(7, b"host")
    )


@pytest.fixture
def server(tmp_path):
    """`jblock-serve` with one tiny model and a profiler port."""
    hf.convert(FIXTURE, tmp_path / "zoo", "tiny", Progress(False))
    profiler = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "serving.main", f"--zoo={tmp_path / 'zoo'}", "--port=0"),
            *(f"--port_file={tmp_path / 'port'}", f"--profiler_port={profiler}"),
            *("--max_num_seqs=1", "--max_model_len=64"),
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "serving 1 model" in line
    words = "; context 64 tokens (max_model_len), float32 weights and float32 KV on cpu, room for 64 tokens"
    assert line.rstrip().endswith(words)
    yield int((tmp_path / "port").read_text()), profiler
    process.terminate()
    process.communicate()


def test_a_trace_names_steps_and_blocks(server, tmp_path):
    port, profiler = server
    done = threading.Event()

    def work():
        with Client(f"127.0.0.1:{port}") as client:
            while not done.is_set():
                client.generate("tiny", [1, 2, 3], max_tokens=20, ignore_eos=True)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{profiler}") as channel:
            profile = channel.unary_unary("/tensorflow.ProfilerService/Profile", None, None)
            profile(profile_request(str(tmp_path / "trace"), 500), timeout=30)
    finally:
        done.set()
        worker.join()
    traces = list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert traces
    trace = traces[0].read_bytes()
    assert b"schedule" in trace
    # A block is named by its first kind, and the id of its first component.
    blocks = set(re.findall(rb"(embedding|layer|head)_[0-9a-f]{8}", trace))
    assert blocks == {b"embedding", b"layer", b"head"}
