"""The standard health service: Check, List and a bounded Watch, none of which logs an error."""

import logging

import grpc
import pytest
import server_harness as harness
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jblock.engine.process.mock import build_engine
from serving import health

SERVICES = {"", "jblock.v1.Inference", "jblock.v1.Models"}


@pytest.fixture
def stub(fast):
    return health_pb2_grpc.HealthStub(fast.channel)


def test_check_of_an_unknown_service(stub):
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "service: 'nothing' is none of this server" in caught.value.details()


@pytest.mark.skipif(not hasattr(health_pb2, "HealthListRequest"), reason="grpc_health has no List")
def test_list(stub, caplog):
    with caplog.at_level(logging.WARNING):
        statuses = stub.List(health_pb2.HealthListRequest()).statuses
    assert set(statuses) == SERVICES
    assert {s.status for s in statuses.values()} == {health_pb2.HealthCheckResponse.SERVING}
    assert not caplog.records


def test_watch_tells_of_changes():
    with harness.serving(build_engine(), drain_seconds=5.0) as running:
        watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        running.call(running.server.stop())
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING


def test_watch_of_an_unknown_service(stub):
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


def test_watchers_are_bounded(fast, stub, monkeypatch):
    monkeypatch.setattr(health, "MAX_WATCHERS", 2)
    watchers = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watcher in watchers:
        next(watcher)
    with pytest.raises(grpc.RpcError) as caught:
        next(stub.Watch(health_pb2.HealthCheckRequest()))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    for watcher in watchers:
        watcher.cancel()
    assert harness.eventually(lambda: fast.server._health._watchers == 0)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    assert harness.eventually(lambda: fast.server._health._watchers == 0)
