"""Where a server listens: each form of host means what it says, and a bad one is blamed by name."""

import socket

import grpc
import pytest
import server_harness as harness

from jblock.engine.process.mock import build_engine
from serving import addresses
from serving.client import Client
from serving.server import ServerConfig

IPV6 = socket.has_ipv6
try:
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
except OSError:
    IPV6 = False


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "[::1]", "::"])
def test_a_host_that_is_right(host):
    if ":" in host and not IPV6:
        pytest.skip("this machine has no IPv6")
    with harness.serving(build_engine(), host=host) as running:
        to = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        with Client(addresses.address(to, running.server.port), timeout=10.0) as client:
            assert client.generate("echo", [1], max_tokens=1).token_ids == (1,)


def test_a_unix_socket(tmp_path):
    host = f"unix:{tmp_path}/socket"
    with harness.serving(build_engine(), host=host) as running:
        assert running.server.port == 0
        with Client(host, timeout=10.0) as client:
            assert client.generate("echo", [1], max_tokens=1).token_ids == (1,)
        with pytest.raises(ValueError, match=r"host: another server listens on .*; stop it"):
            ServerConfig(host=host)
    ServerConfig(host=host)  # What a server left is no obstacle.


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "host: is empty"),
        ("no such host", "host: 'no such host' is no address and no name of a host"),
        ("nowhere.invalid", "host: 'nowhere.invalid' is no address and no name of a host"),
        ("1.2.3.4.5", "host: '1.2.3.4.5' is no address and no name of a host"),
        ("192.0.2.1", "host: '192.0.2.1' is no address of this machine"),
        ("127.0.0.1:8470", "host: '127.0.0.1:8470' is no address and no name"),
        ("http://127.0.0.1", "host: 'http://127.0.0.1' is no address and no name"),
        ("unix:", "host: 'unix:' names no path"),
        ("unix:/nowhere/socket", "host: '/nowhere' is no folder"),
        ("unix:/etc/passwd", "host: '/etc/passwd' is there and is no socket"),
        ("unix:/tmp/" + "x" * 100, "longer than the 100 bytes"),
    ],
)
def test_a_host_that_is_wrong(host, message):
    with pytest.raises(ValueError) as caught:
        ServerConfig(host=host)
    assert message in str(caught.value)


def test_the_host_of_the_metrics_is_checked_too():
    with pytest.raises(ValueError, match=r"metrics_host: .192\.0\.2\.1. is no address"):
        ServerConfig(metrics_host="192.0.2.1", metrics_port=0)
    with pytest.raises(ValueError, match="metrics_host: metrics have no unix socket"):
        ServerConfig(metrics_host="unix:/tmp/x", metrics_port=0)


def test_a_port_that_is_taken_is_the_ports_fault():
    for host in ("127.0.0.1", "::1") if IPV6 else ("127.0.0.1",):
        with harness.serving(build_engine(), host=host) as running:
            port = running.server.port
            with (
                pytest.raises(OSError, match=r"port: cannot listen on .*; free it"),
                harness.serving(build_engine(), host=host, port=port),
            ):
                pass
            assert grpc.insecure_channel(addresses.address(host, port))
