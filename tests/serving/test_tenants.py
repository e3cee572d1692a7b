"""With tenants nobody gets in without a key, nobody crowds others out, and no key is ever shown."""

import asyncio
import hashlib
import json
import logging
import urllib.request

import grpc
import pytest
import server_harness as harness
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from shell import jblock_client

from jblock.engine.process.mock import build_engine
from serving.client import AsyncClient, Client
from serving.tenants import ANONYMOUS, EVERYBODY
from serving.tenants_file import TenantsFile
from serving.v1 import jblock_pb2 as pb
from serving.values import ClientError

KEYS = {"acme": "acme-key-0123456789", "beta": "beta-key-0123456789", "ops": "ops-key-01234567"}
SPARE = "acme-spare-key-01234"


def digest(key):
    return hashlib.sha256(key.encode()).hexdigest()


def entries():
    return [
        {"name": "acme", "key_sha256": [digest(KEYS["acme"]), digest(SPARE)], "max_requests": 2},
        {"name": "beta", "key_sha256": digest(KEYS["beta"]).upper()},
        {"name": "ops", "key_sha256": digest(KEYS["ops"]), "admin": True},
    ]


def write(folder, tenants, name="auth.json", mode=0o600):
    path = folder / name
    path.write_text(tenants if isinstance(tenants, str) else json.dumps({"tenants": tenants}))
    path.chmod(mode)
    return str(path)


@pytest.fixture
def running(tmp_path):
    """A server with three tenants, six places, and one more model in its zoo."""
    tenants = TenantsFile(write(tmp_path, entries()))
    engine = build_engine(more=[{"name": "late"}], step_delay=0.01)
    with harness.serving(engine, tenants=tenants, max_queue=6, metrics_port=0) as one:
        yield one
        assert harness.eventually(one.is_empty)


@pytest.fixture
def client(running):
    """Makes clients by key."""
    clients = []

    def make(key):
        clients.append(Client(running.target, timeout=20.0, key=key))
        return clients[-1]

    yield make
    for one in clients:
        one.close()


CALLS = {
    "generate": lambda c: c.generate("echo", [7], max_tokens=1),
    "stream": lambda c: list(c.stream("echo", [7], max_tokens=1)),
    "models": lambda c: c.models(),
    "model": lambda c: c.model("echo"),
    "load": lambda c: c.load("late"),
    "unload": lambda c: c.unload("echo"),
    "health": lambda c: c.health(),
}


@pytest.mark.parametrize("key", [None, "wrong-key", KEYS["acme"][:-1], KEYS["acme"] + "0"])
@pytest.mark.parametrize("call", CALLS)
def test_no_route_without_a_key(running, client, call, key):
    with pytest.raises(ClientError) as caught:
        CALLS[call](client(key))
    assert caught.value.code == "UNAUTHENTICATED"
    assert "needs 'authorization: Bearer KEY'" in caught.value.message
    assert key is None or key not in caught.value.message
    assert running.engine.stats().steps == 0


def test_reflection_and_unknown_methods_need_a_key_too(running):
    with pytest.raises(grpc.RpcError) as caught:
        list(ProtoReflectionDescriptorDatabase(running.channel).get_services())
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    for kind in ("unary_unary", "stream_unary"):
        call = getattr(running.channel, kind)("/jblock.v1.Inference/Nothing", None, None)
        with pytest.raises(grpc.RpcError) as caught:
            call(b"" if kind == "unary_unary" else iter([b""]))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("call", ["generate", "stream", "models", "model", "health"])
@pytest.mark.parametrize("key", [*KEYS.values(), SPARE])
def test_a_tenant_may_use_the_models(client, call, key):
    assert CALLS[call](client(key))


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", KEYS["acme"])],
        [("authorization", f"Basic {KEYS['acme']}")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer  " + KEYS["acme"])],
        [("authorization", f"Bearer {KEYS['acme']}")] * 2,
        [("x-api-key", KEYS["acme"])],
    ],
)
def test_another_form_of_header_is_refused(running, metadata):
    with pytest.raises(grpc.RpcError) as caught:
        running.stub.Generate(pb.GenerateRequest(model="echo"), metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert KEYS["acme"] not in caught.value.details()


def test_the_scheme_is_not_case_sensitive(running):
    request = harness.ids_request(model="echo", ids=(7,), max_tokens=1)
    metadata = [("authorization", f"bearer {KEYS['acme']}")]
    assert running.stub.Generate(request, metadata=metadata).token_ids == [7]


def test_only_an_admin_changes_what_is_served(client):
    for call in ("load", "unload"):
        with pytest.raises(ClientError, match="PERMISSION_DENIED: tenant acme may not"):
            CALLS[call](client(KEYS["acme"]))
    admin = client(KEYS["ops"])
    assert admin.load("late").name == "late"
    assert len(client(KEYS["acme"]).models()) == 2
    admin.unload("late")


def test_a_tenant_cannot_fill_the_queue(running, client):
    acme, beta, ops = (client(KEYS[name]) for name in KEYS)

    def fill(one, count):
        streams = [one.stream("echo", [7], max_tokens=900) for _ in range(count)]
        for stream in streams:
            next(stream)
        return streams

    streams = fill(acme, 2)
    with pytest.raises(ClientError, match=r"RESOURCE_EXHAUSTED: .*tenant acme has 2 requests open"):
        acme.generate("echo", [7])
    streams += fill(beta, 3)  # half of the six places, where the file names no number
    with pytest.raises(ClientError, match=r"RESOURCE_EXHAUSTED: .*tenant beta has 3 requests open"):
        beta.generate("echo", [7])
    streams += fill(ops, 1)
    with pytest.raises(ClientError, match="UNAVAILABLE: queue: 6 requests are open"):
        ops.generate("echo", [7])
    streams[0].close()
    assert harness.eventually(lambda: running.engine.stats().running == 5)
    assert acme.generate("echo", [7], max_tokens=1).token_ids == (7,)
    for stream in streams:
        stream.close()


def test_cached_prompts_are_a_tenants_own(running, client, monkeypatch, tmp_path):
    salts = []
    original = running.engine.submit
    monkeypatch.setattr(
        running.engine, "submit", lambda r: (salts.append(r.cache_salt), original(r))
    )
    for key in (KEYS["acme"], SPARE, KEYS["beta"]):
        client(key).generate("echo", [7], max_tokens=1)
    acme, spare, beta = salts
    assert acme == spare != beta
    assert "" not in salts and "acme" not in acme
    # Another process has other salts: nobody can work them out from the file.
    again = TenantsFile(write(tmp_path, entries()))
    assert again.find([("authorization", f"Bearer {SPARE}")]).cache_salt != acme


def test_without_tenants_everybody_is_anonymous():
    assert EVERYBODY.find([("authorization", "Bearer whatever")]) is ANONYMOUS
    assert ANONYMOUS.cache_salt == "" and not EVERYBODY.required


def test_health_may_be_opened_for_probes(tmp_path):
    tenants = TenantsFile(write(tmp_path, entries()))
    with harness.serving(build_engine(), tenants=tenants, open_health=True) as running:
        stub = health_pb2_grpc.HealthStub(running.channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == 1
        with pytest.raises(ClientError, match="UNAUTHENTICATED"):
            running.client.models()


def test_no_key_and_no_prompt_in_logs_or_metrics(running, client, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "a-prompt-nobody-must-see"
    with pytest.raises(ClientError):
        client("wrong-key-0123456789").models()
    with pytest.raises(ClientError):
        client(KEYS["acme"]).generate("echo", secret)
    client(KEYS["acme"]).generate("echo", [7], max_tokens=1)
    port = running.server.metrics_port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        metrics = page.read().decode()
    assert "jblock_unauthenticated_total 1.0" in metrics
    said = metrics + caplog.text + "".join(capfd.readouterr())
    for word in ("wrong-key", *KEYS.values(), *(digest(k) for k in KEYS.values()), secret):
        assert word not in said


def test_the_asynchronous_client_sends_its_key_too(running):
    async def ask():
        async with AsyncClient(running.target, timeout=20.0, key=KEYS["ops"]) as one:
            assert await one.health() == "SERVING"
            assert (await one.load("late")).name == "late"
            await one.unload("late")
            return [c async for c in one.stream("echo", [7], max_tokens=2)]

    assert asyncio.run(ask())[-1].finish_reason == "length"


@pytest.mark.parametrize("key", ["", "two words", "line\n", "ключ"])
def test_a_key_that_no_header_holds(key):
    with pytest.raises(ValueError, match="key: ") as caught:
        Client("127.0.0.1:1", key=key)
    assert not key or key not in str(caught.value)


TOML = f"""
[[tenants]]
name = "acme"
key_sha256 = "{digest(KEYS["acme"])}"
admin = true
max_requests = 3
"""


def test_a_file_in_toml(tmp_path):
    tenants = TenantsFile(write(tmp_path, TOML, "auth.toml"))
    tenant = tenants.find([("authorization", f"Bearer {KEYS['acme']}")])
    assert (tenant.name, tenant.admin, tenant.max_requests) == ("acme", True, 3)


def entry(**fields):
    return [{"name": "acme", "key_sha256": digest("k"), **fields}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "auth.json cannot be read: "),
        ("[]", "has no list 'tenants'"),
        ('{"tenants": [], "tenants": []}', "'tenants' stands twice in one object"),
        ('{"tenants": [{"name": "a", "max_requests": 1, "name": "b"}]}', "'name' stands twice"),
        ([], "give at least one tenant"),
        ([7], r"tenants\[0\]: is no table of name, key_sha256, identities, admin"),
        (entry(colour=1), r"tenants\[0\].colour: is no field; there are name"),
        (entry(name="a b"), "name: 'a b' is no name"),
        (entry(name=None), "name: None is no name"),
        (entry(key_sha256=None), "key_sha256: is missing"),
        (entry(key_sha256=[]), "key_sha256: is missing"),
        (entry(key_sha256="my-real-key"), "key_sha256: is not the 64 hex digits of a digest"),
        (entry(key_sha256=[digest("k"), 7]), "key_sha256: is not the 64 hex digits"),
        (entry(admin="yes"), "admin: 'yes' is neither true nor false"),
        (entry(max_requests=0), "max_requests: 0 is no whole number of at least 1"),
        (entry(max_requests=True), "max_requests: True is no whole number"),
        (entry() + entry(key_sha256=digest("l")), r"tenants\[1\].name: 'acme' is there twice"),
        (entry() + entry(name="b"), r"tenants\[1\].key_sha256: is there twice"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"auth_file: .*{message}") as caught:
        TenantsFile(write(tmp_path, content))
    assert "my-real-key" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path, mode):
    with pytest.raises(ValueError, match="others may write it; run: chmod go-w"):
        TenantsFile(write(tmp_path, entries(), mode=mode))


def test_a_file_of_another_format_or_none(tmp_path):
    with pytest.raises(ValueError, match=r"is neither .json nor .toml"):
        TenantsFile(write(tmp_path, entries(), "auth.txt"))
    with pytest.raises(OSError, match="auth"):
        TenantsFile(str(tmp_path / "auth.json"))


def shell(running, *args, **environment):
    return jblock_client(f"--target={running.target}", *args, env=environment)


def test_the_shell_client_takes_a_key_from_a_file_or_the_environment(running, tmp_path):
    refused = shell(running, "models")
    assert refused.returncode == 2 and "UNAUTHENTICATED" in refused.stderr
    listed = shell(running, "models", JBLOCK_API_KEY=KEYS["acme"])
    assert listed.stdout.startswith("echo@1: ")
    file = tmp_path / "key"
    file.write_text(KEYS["ops"] + "\n")
    by_file = f"--api_key_file={file}"
    assert shell(running, by_file, "load", "late").stdout.startswith("late@1: mock")
    assert shell(running, by_file, "unload", "late").returncode == 0
    again = shell(running, by_file, "unload", "late")
    assert again.returncode == 2 and "NOT_FOUND: name: 'late' is not served" in again.stderr
    nowhere = shell(running, "--api_key_file=/nowhere", "models")
    assert nowhere.returncode == 2 and "/nowhere" in nowhere.stderr
