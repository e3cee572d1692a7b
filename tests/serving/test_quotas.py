"""What a tenant may use: models, lengths, requests and tokens a minute, and its share of a full queue."""

import contextlib
import hashlib
import json
import os
import time

import grpc
import pytest
import server_harness as harness
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from http_harness import ask

from jblock.engine.process.mock import build_engine
from serving.client import Client
from serving.errors import RequestError
from serving.quotas import Quotas
from serving.tenants import Tenant, Tenants
from serving.tenants_file import TenantsFile
from serving.values import ClientError


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def tenants(*listed):
    """Each tenant's key is its name."""
    return Tenants([(hashlib.sha256(t.name.encode()).digest(), t) for t in listed])


@contextlib.contextmanager
def clients(running, *names):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Client(running.target, timeout=20.0, key=n)) for n in names]


def test_requests_a_minute_come_back_evenly():
    clock = Clock()
    quotas, acme = Quotas(clock), Tenant(name="acme", requests_per_minute=6)
    for _ in range(6):
        quotas.request(acme)
    with pytest.raises(RequestError, match="requests_per_minute: tenant acme may make 6") as caught:
        quotas.request(acme)
    assert caught.value.retry_after == pytest.approx(10.0)
    assert caught.value.by_tenant and caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    clock.now += 10.0
    quotas.request(acme)
    with pytest.raises(RequestError):
        quotas.request(acme)
    quotas.request(Tenant(name="beta"))  # Nobody else has a limit.


def test_tokens_are_taken_before_they_are_used_and_what_was_not_used_comes_back():
    clock = Clock()
    quotas, acme = Quotas(clock), Tenant(name="acme", tokens_per_minute=600)
    first = quotas.reserve(acme, 100, 300)
    with pytest.raises(RequestError, match=r"tokens_per_minute: .* up to 250") as caught:
        quotas.reserve(acme, 50, 200)
    assert caught.value.retry_after == pytest.approx(5.0)
    first.settle(150)
    first.settle(0)  # Counts once.
    quotas.reserve(acme, 50, 200)
    assert dict(quotas.headers(acme)) == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "200",
        "x-ratelimit-reset-tokens": "40s",
    }
    clock.now += 3600.0
    assert dict(quotas.headers(acme))["x-ratelimit-remaining-tokens"] == "600"


def test_a_prompt_that_never_fits_a_minute_is_wrong_and_a_long_answer_is_not():
    quotas, acme = Quotas(Clock()), Tenant(name="acme", tokens_per_minute=100)
    with pytest.raises(RequestError, match="prompt: has 101 tokens") as caught:
        quotas.reserve(acme, 101, 1)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    quotas.reserve(acme, 50, 900).settle(950)
    with pytest.raises(RequestError) as caught:
        quotas.reserve(acme, 1, 0)  # What it used above a minute's worth is used.
    assert caught.value.retry_after == 120.0


def test_a_quota_that_was_changed_begins_full():
    quotas = Quotas(Clock())
    quotas.reserve(Tenant(name="acme", tokens_per_minute=10), 10, 0)
    quotas.reserve(Tenant(name="acme", tokens_per_minute=20), 20, 0)


@pytest.fixture
def limited():
    listed = tenants(
        Tenant(name="acme", models=("echo", "late*"), max_prompt_tokens=4, max_output_tokens=3),
        Tenant(name="slow", requests_per_minute=1, tokens_per_minute=1000),
        Tenant(name="none", models=()),
    )
    engine = build_engine(models=[{"name": "echo"}, {"name": "other"}])
    with harness.serving(engine, tenants=listed, http_port=0, metrics_port=0) as running:
        yield running
        assert harness.eventually(running.is_empty)


def test_a_model_that_a_tenant_may_not_use_is_not_there(limited):
    with clients(limited, "acme", "none") as (acme, none):
        assert [m.name for m in acme.models()] == ["echo"]
        with pytest.raises(ClientError) as caught:
            acme.generate("other", [7])
        assert caught.value.code == "NOT_FOUND"
        assert caught.value.message == "model: 'other' is not served; choose one of echo"
        with pytest.raises(ClientError, match="NOT_FOUND"):
            acme.model("other")
        assert none.models() == ()
    port = limited.server.http_port
    assert [m["id"] for m in ask(port, "/v1/models", key="acme").json["data"]] == ["echo"]
    for path in ("/v1/models/other", "/m/other/v1/models"):
        assert ask(port, path, key="acme").status == 404
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        content = {"model": "other", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        content.pop("messages" if path != "/v1/chat/completions" else "prompt")
        assert ask(port, path, content, key="acme").error["code"] == "model_not_found"


def test_lengths_of_a_tenant(limited):
    with clients(limited, "acme") as (acme,):
        with pytest.raises(ClientError, match="prompt: has 5 tokens, and tenant acme may send 4"):
            acme.generate("echo", [1, 2, 3, 4, 5])
        with pytest.raises(ClientError, match="max_tokens: 4 is more than the 3"):
            acme.generate("echo", [1], max_tokens=4)
        assert len(acme.generate("echo", [1]).token_ids) == 3


def test_a_used_up_quota_on_the_wire(limited):
    port = limited.server.http_port
    content = {"model": "echo", "prompt": [7, 8], "max_tokens": 3}
    answer = ask(port, "/v1/completions", content, key="slow")
    assert answer.status == 200
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    refused = ask(port, "/v1/completions", content, key="slow")
    assert refused.status == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.error["code"] == "rate_limit_exceeded"
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) >= 990  # Five were used.
    with pytest.raises(grpc.RpcError) as caught:
        limited.stub.Generate(
            harness.ids_request(ids=(7,)), metadata=[("authorization", "Bearer slow")]
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    (detail,) = rpc_status.from_call(caught.value).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry) and 0 < retry.retry_delay.ToTimedelta().total_seconds() <= 60


def test_counts_of_a_tenant(limited):
    with clients(limited, "acme") as (acme,):
        acme.generate("echo", [1, 2])
        with pytest.raises(ClientError):
            acme.generate("echo", [1] * 5)
    registry = limited.server._metrics.registry
    counted = {
        (s.labels.get("tenant"), s.labels.get("code") or s.labels.get("kind")): s.value
        for family in registry.collect()
        for s in family.samples
        if family.name.startswith("jblock_tenant_") and s.name.endswith("_total")
    }
    assert counted[("acme", "OK")] == counted[("acme", "INVALID_ARGUMENT")] == 1
    assert (counted[("acme", "prompt")], counted[("acme", "completion")]) == (2, 3)


def test_a_full_queue_sheds_what_is_above_a_tenants_share():
    """Four places, two tenants of equal weight: the second one gets its two, from what has not begun."""
    engine = build_engine(step_delay=0.01, max_num_seqs=1)
    listed = tenants(Tenant(name="acme", max_requests=4), Tenant(name="beta", max_requests=4))
    with (
        harness.serving(engine, tenants=listed, max_queue=4) as running,
        clients(running, "acme", "beta") as (acme, beta),
    ):
        begun = acme.stream("echo", [7], max_tokens=400)
        next(begun)
        waiting = [
            running.stub.Generate.future(
                harness.ids_request(ids=(7,), max_tokens=1),
                metadata=[("authorization", "Bearer acme")],
            )
            for _ in range(3)
        ]
        assert harness.eventually(lambda: running.server._dispatcher.num_open == 4)
        own = [
            running.stub.Generate.future(
                harness.ids_request(ids=(7,), max_tokens=1),
                metadata=[("authorization", "Bearer beta")],
            )
            for _ in range(2)
        ]
        assert harness.eventually(lambda: sum(one.done() for one in waiting) == 2)
        for shed in (one for one in waiting if one.done()):
            assert shed.code() is grpc.StatusCode.UNAVAILABLE
            assert "tenant acme has more than its share" in shed.details()
        with pytest.raises(ClientError, match="UNAVAILABLE: queue: "):
            beta.generate("echo", [7])
        begun.close()
        (kept,) = (one for one in waiting if not one.done() or one.code() is grpc.StatusCode.OK)
        assert kept.result().token_ids == [7]
        assert [one.result().token_ids for one in own] == [[7], [7]]
        assert harness.eventually(running.is_empty)


def write(path, listed, **more):
    path.write_text(json.dumps({"tenants": listed, **more}))
    path.chmod(0o600)
    later = time.time() + write.count  # Two writes within a tick of the file system's clock differ.
    write.count += 1
    os.utime(path, (later, later))
    return str(path)


write.count = 1


def entry(name, **fields):
    return {"name": name, "key_sha256": hashlib.sha256(name.encode()).hexdigest(), **fields}


def find(found, name):
    return found.find([("authorization", f"Bearer {name}")])


def test_a_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path):
    path = tmp_path / "auth.json"
    found = TenantsFile(write(path, [entry("acme"), entry("beta")]))
    salt = find(found, "acme").cache_salt
    write(path, [entry("acme", weight=2), entry("gone", models=["a*"])])
    found.files.refresh()
    assert (found.files.reloads, found.files.refusals) == (1, 0)
    assert find(found, "acme").weight == 2 and find(found, "acme").cache_salt == salt
    with pytest.raises(RequestError):
        find(found, "beta")
    # One wrong entry, after a right one.
    write(path, [entry("late"), entry("acme", weight=-1)])
    for _ in range(3):
        found.files.refresh()
    assert (found.files.reloads, found.files.refusals) == (1, 1)
    assert find(found, "gone").models == ("a*",)
    with pytest.raises(RequestError):
        find(found, "late")
    path.unlink()
    found.files.refresh()
    assert found.files.refusals == 2 and find(found, "acme")
    write(path, [entry("late")])
    found.files.refresh()
    assert find(found, "late")


def test_a_server_takes_a_file_that_was_written_anew(tmp_path):
    path = tmp_path / "auth.json"
    found = TenantsFile(write(path, [entry("acme")]))
    with (
        harness.serving(build_engine(), tenants=found, metrics_port=0) as running,
        clients(running, "acme", "beta") as (acme, beta),
    ):
        assert acme.models()
        with pytest.raises(ClientError, match="UNAUTHENTICATED"):
            beta.models()
        write(path, [entry("beta")])

        def taken():
            with contextlib.suppress(ClientError):
                return bool(beta.models())

        assert harness.eventually(taken)
        with pytest.raises(ClientError, match="UNAUTHENTICATED"):
            acme.models()
        write(path, [])
        registry = running.server._metrics.registry
        labels = {"file": "auth_file", "outcome": "refused"}
        assert harness.eventually(
            lambda: registry.get_sample_value("jblock_file_reloads_total", labels) == 1
        )
        assert beta.models()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0}, "weight: 0 is no number from 0.001"),
        ({"weight": True}, "weight: True is no number"),
        ({"weight": float("nan")}, "weight: nan is no number"),
        ({"models": "echo"}, "models: is no list"),
        ({"models": [""]}, "models: is no list"),
        ({"requests_per_minute": 0}, "requests_per_minute: 0 is no whole number of at least 1"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute: 1.5 is no whole number"),
        ({"max_prompt_tokens": -1}, "max_prompt_tokens: -1 is no whole number"),
        ({"priority_ceiling": "high"}, "priority_ceiling: 'high' is no whole number"),
        ({"identities": ["acme"]}, "identities: 'acme' is none; give uri:"),
        ({"share_cache": 1}, "share_cache: 1 is neither true nor false"),
    ],
)
def test_fields_that_cannot_be_used(tmp_path, fields, message):
    with pytest.raises(ValueError, match=rf"auth_file: tenants\[0\]\.{message}"):
        TenantsFile(write(tmp_path / "auth.json", [entry("acme", **fields)]))


def test_the_list_of_revoked_certificates_is_checked(tmp_path):
    with pytest.raises(ValueError, match="auth_file: revoked: is no list of sha256"):
        TenantsFile(write(tmp_path / "auth.json", [entry("acme")], revoked=["7"]))
    with pytest.raises(ValueError, match="auth_file: other: is no field"):
        TenantsFile(write(tmp_path / "auth.json", [entry("acme")], other=1))


def test_prefixes_are_shared_by_those_who_opt_in(tmp_path):
    listed = [entry("a", share_cache=True), entry("b", share_cache=True), entry("c"), entry("d")]
    found = TenantsFile(write(tmp_path / "auth.json", listed))
    a, b, c, d = (find(found, name).cache_salt for name in "abcd")
    assert a == b and len({a, c, d}) == 3


def test_a_priority_has_a_ceiling_and_all_travels_to_the_engine(monkeypatch):
    listed = tenants(Tenant(name="acme", weight=2.5, priority_ceiling=-3), Tenant(name="beta"))
    sent = []
    with (
        harness.serving(build_engine(), tenants=listed, http_port=0) as running,
        clients(running, "acme", "beta") as (acme, beta),
    ):
        original = running.engine.submit
        monkeypatch.setattr(running.engine, "submit", lambda r: (sent.append(r), original(r)))
        acme.generate("echo", [7], max_tokens=1, priority=-3)
        beta.generate("echo", [7], max_tokens=1)
        assert [(r.tenant, r.weight, r.priority) for r in sent] == [
            ("acme", 2.5, -3),
            ("beta", 1.0, 0),
        ]
        assert all(0 < r.deadline < 21 for r in sent)  # grpc rounds up what goes over the wire
        with pytest.raises(ClientError, match="priority: -1 is more urgent than 0"):
            beta.generate("echo", [7], priority=-1)
        content = {"model": "echo", "prompt": [7], "priority": -1}
        refused = ask(running.server.http_port, "/v1/completions", content, key="beta")
        assert (refused.status, refused.error["param"]) == (400, "priority")
