"""`jblock-serve` and `jblock-client` as a shell sees them: output, exit codes, signals."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import server_harness as harness
from forked import run_each
from shell import jblock_client as client
from tokenizer_fixtures import byte_level

from serving.client import Client
from serving.values import ClientError

HERE = pathlib.Path(__file__).parent
# SIGHUP as a terminal has it: under nohup programs are deaf to it.
SERVE = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import serving.main as m
m.engine_processes.FACTORY = 'served_mock:build_engine'
m.run()
"""


@pytest.fixture
def start_server():
    """Starts servers, and leaves none behind."""
    servers = []

    def start(*flags):
        path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
        servers.append(
            subprocess.Popen(
                [sys.executable, "-c", SERVE, *flags],
                env={**os.environ, "PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return servers[-1]

    yield start
    for server in servers:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("engine", "number"),
    [("process", signal.SIGTERM), ("process", signal.SIGINT), ("thread", signal.SIGTERM)],
)
def test_serve_says_where_drains_and_ends_with_0(start_server, tmp_path, engine, number):
    port_file = tmp_path / "port"
    server = start_server(
        "--zoo=x", "--port=0", f"--port_file={port_file}", f"--engine={engine}", "--metrics_port=0"
    )
    line = server.stdout.readline()
    port = int(port_file.read_text())
    assert line.startswith(f"jblock: serving 1 model on 127.0.0.1:{port}, metrics on port ")
    with Client(f"127.0.0.1:{port}") as stub:
        stream = stub.stream("echo", [1], max_tokens=30)
        next(stream)
        server.send_signal(number)
        assert list(stream)[-1].usage.completion_tokens == 30
    out, err = server.communicate(timeout=120)
    assert (server.returncode, out) == (0, "")
    assert "Traceback" not in err


def test_serve_with_two_agents_goes_on_when_one_is_killed(start_server, tmp_path):
    port_file = tmp_path / "port"
    server = start_server("--zoo=x", "--port=0", f"--port_file={port_file}", "--agents=2")
    assert server.stdout.readline().startswith("jblock: serving 1 model on ")
    children = pathlib.Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    with Client(f"127.0.0.1:{port_file.read_text().strip()}") as stub:
        streams = [stub.stream("echo", [i], max_tokens=100) for i in (1, 2)]
        got = [list(next(stream).token_ids) for stream in streams]
        os.kill(int(children[0]), signal.SIGKILL)
        for i, stream in enumerate(streams):
            got[i] += [token for chunk in stream for token in chunk.token_ids]
    assert got == [[1] * 100, [2] * 100]
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=120)
    assert server.returncode == 0


def test_memory_that_is_stated_is_of_all_agents(start_server):
    server = start_server("--zoo=show", "--port=0", "--agents=2", "--kv_memory_mb=9")
    _, err = server.communicate(timeout=120)
    assert "settings: {'host_cache_mb': 256, 'host_kv_memory_mb': 128, 'kv_memory_mb': 5}" in err


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGQUIT)]
)
def test_a_second_signal_hurries(start_server, tmp_path, numbers):
    server = start_server("--zoo=x", f"--host=unix:{tmp_path}/socket", "--drain_seconds=60")
    assert server.stdout.readline() == f"jblock: serving 1 model on unix:{tmp_path}/socket\n"
    with Client(f"unix:{tmp_path}/socket", resume_seconds=0.0) as stub:
        stream = stub.stream("echo", [1], max_tokens=1000)
        next(stream)
        server.send_signal(numbers[0])
        time.sleep(0.3)
        assert server.poll() is None
        server.send_signal(numbers[1])
        with pytest.raises(ClientError, match="UNAVAILABLE: server: shut down before"):
            list(stream)
    _, err = server.communicate(timeout=10)
    assert server.returncode == 0
    assert "1 requests were not over when it was to hurry, and were cut off" in err


def test_every_engine_flag_reaches_the_engine(start_server):
    grids = {"decode_sizes": "1,8", "prefill_grids": "1x64,4x16"}
    flags = {
        "backend": "xla",
        "dtype": "bfloat16",
        "host_kv_memory_mb": 4,
        "kv_dtype": "int8",
        "kv_memory_mb": 5,
        "max_model_len": 7,
        "max_num_seqs": 8,
        "models": ("a", "b"),
        "page_size": 9,
        "profiler_port": 6,
    }
    every = (flags | grids).items()
    given = [f"--{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in every]
    server = start_server("--zoo=show", "--port=0", "--noshare", *given)
    _, err = server.communicate(timeout=120)
    assert server.returncode == 2
    lists = {"models": ["a", "b"], "decode_sizes": [1, 8], "prefill_grids": [[1, 64], [4, 16]]}
    arrived = dict(sorted({**flags, **lists, "share": False}.items()))
    assert f"settings: {arrived}" in err


def test_what_is_not_given_is_left_to_the_engine(start_server):
    server = start_server("--zoo=show", "--port=0")
    _, err = server.communicate(timeout=120)
    assert "jblock-serve: settings: {}" in err


BAD_FLAGS = [
    (["--zoo=x", "--port=99999"], "jblock-serve: port: 99999 is no port"),
    (["--zoo=x", "--max_queue=0"], "jblock-serve: max_queue: 0 admits nothing"),
    (["--zoo=x", "stray"], "jblock-serve: arguments: ['stray'] are not understood"),
    (["--zoo="], "jblock-serve: zoo: is missing"),
    (["--zoo=x", "--agents=0"], "agents"),
    (["--zoo=x", "--agents=2", "--engine=thread"], "jblock-serve: agents: 2 of them"),
    (["--zoo=x", "--agents=a:1,b"], "jblock-serve: agents: 'b' is no address"),
    (
        ["--zoo=x", "--agents=a:1,b:1"],
        "jblock-serve: agents_secret_file: give it alone, or agents_tls_cert_file",
    ),
    (
        ["--zoo=x", "--ray=auto", "--agents=a:1"],
        "jblock-serve: agents: a:1: with --ray give how many",
    ),
    (["--zoo=x", "--ray=auto", "--mesh=pp=2"], "jblock-serve: mesh: 'pp=2' with --ray"),
    (
        ["--zoo=x", "--ray=auto", "--ray_resources=GPU"],
        "jblock-serve: ray_resources: 'GPU' is none",
    ),
    (["--zoo=x", "--models="], "jblock-serve: models: '' leaves a name empty"),
    (["--zoo=x", "--models=a,,b"], "jblock-serve: models: 'a,,b' leaves a name empty"),
    (["--zoo=x", "--models=a@1,b,a@2"], "jblock-serve: models: 'a' is there twice"),
    (["--zoo=x", "--prefill_grids=8"], "jblock-serve: prefill_grids: '8' is no entry"),
    (["--zoo=x", "--decode_sizes=1,0"], "jblock-serve: decode_sizes: '0' is no entry"),
    (["--zoo=x", "--host=nowhere.invalid"], "jblock-serve: host: 'nowhere.invalid' is no"),
    ([], "jblock-serve: zoo: is missing"),
    (["--zoo=x", "--engine_address=x"], "jblock-serve: engine_address: the engine there"),
    (["--engine_address=/nowhere"], "engine_address: no engine listens at /nowhere"),
    (["--zoo=x", "--nonsense"], "jblock-serve: Unknown command line flag 'nonsense'"),
    (["--zoo=x", "--profiler_port=-1"], "profiler_port"),
]


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """The exit code and the words of each bad command line."""
    folder = tmp_path_factory.mktemp("refused")
    return run_each("serving.main", [flags for flags, _ in BAD_FLAGS], folder)


@pytest.mark.parametrize("at", range(len(BAD_FLAGS)), ids=lambda at: " ".join(BAD_FLAGS[at][0]))
def test_bad_flags(refused, at):
    code, words = refused[at]
    assert code == 2
    assert BAD_FLAGS[at][1] in words and "Traceback" not in words


def test_client_generates(fast):
    to = f"--target={fast.target}"
    max_tokens = f"--max_tokens={len(byte_level().encode('héllo 🙂').ids)}"
    done = client(to, "generate", "--model=echo", "--prompt=héllo 🙂", max_tokens)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "héllo 🙂\n"
    streamed = client(to, "generate", "--model=echo", "--prompt=héllo 🙂", max_tokens, "--stream")
    assert streamed.stdout == done.stdout
    as_json = client(
        to, "generate", "--model=ids", "--token_ids=1,2", "--max_tokens=3", "--json", "--logprobs"
    )
    assert '"token_ids": [2, 3, 2]' in as_json.stdout
    assert '"logprobs": [-0.5, -0.5, -0.5]' in as_json.stdout


def test_client_shows_models_and_health(fast):
    to = f"--target={fast.target}"
    listed = client(to, "models")
    assert "echo@3: mock, 4 of 5 blocks shared\n" in listed.stdout
    assert "adapter@1: mock, 0 of 0 blocks shared, on echo@3\n" in listed.stdout
    assert f"vocab_size: {harness.VOCAB_SIZE}\n" in client(to, "models", "echo").stdout
    checked = client(to, "health")
    assert (checked.returncode, checked.stdout) == (0, "SERVING\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--model=nobody", "--prompt=x"], "jblock-client: NOT_FOUND: model: 'nobody'"),
        (
            ["generate", "--model=echo", "--prompt=x", "--top_p=2"],
            "jblock-client: INVALID_ARGUMENT: top_p: 2.0 is outside (0, 1]",
        ),
        (["generate", "--model=echo", "--prompt=x", "--seed=-1"], "jblock-client: request: "),
        (
            ["generate", "--model=echo"],
            "one of the arguments --prompt --prompt_file --prompts_file --token_ids is required",
        ),
        (["generate", "--model=echo", "--token_ids=1,x"], "'1,x' is no list of ids such as 1,2,3"),
        (["models", "nobody"], "jblock-client: NOT_FOUND: name: 'nobody'"),
        ([], "the following arguments are required: command"),
    ],
)
def test_client_says_what_is_wrong_and_ends_with_2(fast, args, message):
    done = client(f"--target={fast.target}", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_client_without_a_server():
    command = [sys.executable, "-m", "serving.client_main", "--target=127.0.0.1:1", "models"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 2
    assert "jblock-client: UNAVAILABLE" in done.stderr


def test_client_errors_carry_the_status():
    with Client("127.0.0.1:1") as stub, pytest.raises(ClientError) as caught:
        stub.health()
    assert caught.value.code == "UNAVAILABLE"
