"""Several front ends on one engine, over real sockets: their requests never mix, and one that dies takes only
its own with it."""

import contextlib
import os
import signal
import socket
import stat
import threading

import pytest
import server_harness as harness
from test_commands import start_server  # noqa: F401 (a fixture)
from test_soak import children

from jblock.engine import api
from jblock.engine.process import mock
from jblock.engine.process.shared import SharedEngine, remote_engine
from serving.client import Client
from serving.values import ClientError


@contextlib.contextmanager
def sharing(engine, path):
    """An engine that is shared out at a path; gives what ended it, once that is over."""
    shared, stop, ends = SharedEngine(engine, str(path)), threading.Event(), []

    def run():
        try:
            shared.run(stop)
            ends.append(None)
        except (ValueError, api.EngineDied) as error:
            ends.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield shared, ends
    finally:
        stop.set()
        thread.join(20.0)
    assert ends


@pytest.fixture
def path(tmp_path):
    return tmp_path / "engine"


def ids_of(chunks):
    return [i for c in chunks for i in c.token_ids]


def test_two_front_ends_and_one_dies(path):
    engine = mock.build_engine(
        models=[{"name": "echo"}], more=[{"name": "other"}], step_delay=0.005
    )
    with (
        sharing(engine, path) as (shared, _),
        harness.serving(remote_engine(str(path))) as one,
        harness.serving(remote_engine(str(path))) as two,
    ):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        lost = one.client.stream("echo", [1, 2], max_tokens=1000)
        kept = two.client.stream("echo", [3], max_tokens=200)
        begun = [next(lost), next(kept)]  # Both are request 0 of their front end.
        assert set(ids_of(begun[:1])) <= {1, 2} and set(ids_of(begun[1:])) == {3}
        assert harness.eventually(lambda: engine.stats().running == 2)
        assert harness.eventually(lambda: two.engine.stats().running == 2)
        # A change that one asks for is known to the other.
        one.client.load("other")
        assert harness.eventually(lambda: len(two.client.models()) == 2)
        two.client.unload("other")
        assert harness.eventually(lambda: len(one.client.models()) == 1)
        with pytest.raises(ClientError, match="NOT_FOUND"):
            one.client.load("nobody")
        one.engine._child.kill()  # As when its process is killed.
        with pytest.raises(ClientError, match=f"UNAVAILABLE: engine: the engine at {path} is gone"):
            list(lost)
        assert harness.eventually(lambda: engine.stats().running == 1 and shared.num_open == 1)
        assert ids_of([begun[1], *kept]) == [3] * 200
        assert harness.eventually(two.is_empty)
        with harness.serving(remote_engine(str(path))) as three:
            assert three.client.generate("echo", [5], max_tokens=2).token_ids == (5, 5)


def test_an_engine_that_ends_is_told(path):
    engine = mock.build_engine(die_after_steps=3)
    with sharing(engine, path) as (_, ends):
        remote = remote_engine(str(path))
        assert [m.name for m in remote.models()] == ["echo"] and remote.is_up
        remote.submit(api.Request(request_id="a", model="echo", token_ids=(1,)))
        with pytest.raises(api.EngineDied, match="told to die after 3 steps"):
            for _ in range(1000):
                remote.poll(1.0)
        remote.close()
        assert harness.eventually(lambda: bool(ends)) and isinstance(ends[0], api.EngineDied)
    assert not path.exists()


def test_where_an_engine_may_be_shared(path):
    with pytest.raises(OSError, match=f"engine_address: no engine listens at {path}"):
        remote_engine(str(path))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with sharing(mock.build_engine(), path):
        other = mock.build_engine()
        with pytest.raises(OSError, match="share_engine: an engine listens at"):
            SharedEngine(other, str(path))
        other.close()
        # What is no frame of ours ends its own connection alone.
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(path))
            stranger.sendall(b"\0\0\0\x05hello")
            while stranger.recv(65536):
                pass
        remote = remote_engine(str(path))
        assert remote.models()
        remote.close()


@pytest.mark.long
def test_processes_of_their_own(start_server, path, tmp_path):  # noqa: F811
    engine = start_server("--zoo=x", f"--share_engine={path}")
    assert engine.stdout.readline() == f"jblock: an engine is shared at {path}\n"
    ports, servers = [], []
    for number in range(2):
        file = tmp_path / f"port{number}"
        flags = (f"--engine_address={path}", "--port=0", f"--port_file={file}", "--http_port=0")
        servers.append(start_server(*flags))
        assert servers[-1].stdout.readline().startswith("jblock: serving 1 model on ")
        ports.append(int(file.read_text()))
    clients = [Client(f"127.0.0.1:{port}", resume_seconds=0.0) for port in ports]
    streams = [c.stream("echo", [i], max_tokens=150) for i, c in enumerate(clients, 1)]
    got = [ids_of([next(stream)]) for stream in streams]
    servers[0].send_signal(signal.SIGKILL)
    with pytest.raises(ClientError, match="UNAVAILABLE"):
        list(streams[0])
    # The engine's process dies and is replaced; the front end goes on.
    (child,) = children(engine.pid)
    os.kill(child, signal.SIGKILL)
    assert got[1] + ids_of(streams[1]) == [2] * 150
    stream = clients[1].stream("echo", [7], max_tokens=50)
    next(stream)
    engine.send_signal(signal.SIGTERM)  # It waits for what is open, and its front ends end with it.
    assert len(ids_of(stream)) == 49
    assert engine.wait(60) == 0
    assert servers[1].wait(60) == 1
    for client in clients:
        client.close()
