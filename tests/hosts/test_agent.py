"""An agent and its server, each end real: what a server sees of an engine beside an agent is what it sees of
one of its own, and strangers see nothing."""

import contextlib
import os
import signal
import socket
import threading

import pytest
from host_agents import (
    alive,
    answer,
    eventually,
    free_address,
    mock_agent,
    remote_engine,
    secret_file,
)

from jblock.engine import api
from jblock.engine.process.client import ProcessEngine
from jblock.engine.process.supervisor import SupervisedEngine
from jblock.hosts.credentials import from_files
from jblock.hosts.remote_child import RemoteChild


@pytest.fixture
def secret(tmp_path):
    return secret_file(tmp_path)


@pytest.fixture
def address(secret):
    """Of an agent."""
    where = free_address()
    agent = mock_agent(where, secret)
    yield where
    agent.close()


def test_an_engine_beside_an_agent_is_like_one_here(address, secret):
    engine = remote_engine(address, secret, more=[{"name": "late"}])
    assert [m.name for m in engine.models()] == ["echo"] and alive(engine.pid)
    assert answer(engine) == [4, 5, 4]
    assert [m.name for m in engine.serve(["echo", "late"])] == ["echo", "late"]
    with pytest.raises(api.UnknownChain):
        engine.serve(["nobody"])
    pid = engine.pid
    engine.close()
    assert not alive(pid)


def test_how_a_process_ended_is_told(address, secret):
    engine = remote_engine(address, secret)
    engine.models()
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(api.EngineDied, match=f"agent {address}: .* was killed by SIGKILL"):
        while True:
            engine.poll(1.0)
    engine.close()
    engine = remote_engine(address, secret, exit_at_start=7)
    with pytest.raises(api.EngineDied, match="exited with code 7"):
        engine.models()
    engine.close()


def test_what_is_not_for_agents_is_not_started(address, secret):
    known = from_files({"secret_file": secret})
    engine = ProcessEngine("os:system", {}, begin=lambda: RemoteChild(lambda: address, known))
    with pytest.raises(ValueError, match="'os:system' is none that an agent starts"):
        engine.models()
    engine.close()


def test_requests_go_on_when_a_process_or_the_agent_itself_is_replaced(secret):
    where = free_address()
    agent = mock_agent(where, secret)
    engine = SupervisedEngine(
        lambda served: remote_engine(where, secret, step_delay=0.01), backoff_seconds=0.01
    )
    engine.models()
    sampling = api.SamplingParams(max_tokens=100, ignore_eos=True)
    engine.submit(api.Request(request_id="r", model="echo", token_ids=(4, 5), sampling=sampling))
    got, done, replaced = [], False, 0
    while not done:
        for output in engine.poll(1.0):
            got += output.token_ids
            done = output.finish_reason is not None
        if len(got) > 20 and replaced == 0:
            os.kill(engine.pid, signal.SIGKILL)
            replaced = 1
        if len(got) > 40 and replaced == 1:
            pid = engine.pid
            agent.close()
            assert not alive(pid)
            agent = mock_agent(where, secret)
            replaced = 2
    assert got == [4, 5] * 50
    assert engine.stats().restarts == replaced == 2
    engine.close()
    agent.close()


@pytest.mark.long
def test_an_agent_works_for_one_server_and_others_wait(address, secret, monkeypatch):
    monkeypatch.setattr("jblock.hosts.agent._HANDOVER_SECONDS", 0.05)
    first, second = (remote_engine(address, secret) for _ in range(2))
    one, other = (first, second) if eventually_one(first, second) else (second, first)
    assert answer(one) == [4, 5, 4]
    assert not other.is_warm
    one.close()
    assert answer(other) == [4, 5, 4]
    other.close()


def eventually_one(first: ProcessEngine, second: ProcessEngine) -> bool:
    """Whether the first of two is the one that is warm."""
    assert eventually(lambda: first.is_warm or second.is_warm)
    return first.is_warm


class Recorder:
    """Stands between a server and an agent and keeps what the server sends."""

    def __init__(self, to: str):
        self.bytes: list[bytes] = []
        self._to = to.rpartition(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection((self._to[0], int(self._to[2])))
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=(*pair, pair[0] is here)).start()

    def _copy(self, source, target, keep):
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                if keep:
                    self.bytes.append(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self._listener.close()


def test_strangers_get_nothing_and_harm_nothing(address, secret, tmp_path):
    """Garbage, plain HTTP, half a hello, another secret, a session played again, and connections that say
    nothing, before and while a server that is known has its engine there."""
    recorder = Recorder(address)
    engine = remote_engine(recorder.address, secret)
    assert answer(engine) == [4, 5, 4]
    engine.close()
    recorder.close()
    session = b"".join(recorder.bytes)
    assert b"echo" not in session and len(session) > 500
    engine = remote_engine(address, secret)
    assert answer(engine) == [4, 5, 4]
    pid = engine.pid
    host, port = "127.0.0.1", int(address.rpartition(":")[2])
    held = []
    for data in (
        b"\x00" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"GET / HTTP/1.1\r\n\r\n",
        session[:100],
        session,
        *[b""] * 60,
    ):
        one = socket.create_connection((host, port))
        one.settimeout(60.0)
        with contextlib.suppress(OSError):
            one.sendall(data)
        held.append(one)
    other = remote_engine(address, secret_file(tmp_path, "other", "f" * 64))
    assert answer(engine, "again") == [4, 5, 4]
    assert engine.pid == pid and engine.is_warm and not other.is_warm
    # What said something that is no handshake of a friend is hung up on, and was told no secret.
    for one in held[:3] + held[4:5]:
        said = b""
        with contextlib.suppress(OSError):
            while data := one.recv(2**16):
                said += data
        assert b"echo" not in said
    other.close()
    engine.close()
    for one in held:
        one.close()
