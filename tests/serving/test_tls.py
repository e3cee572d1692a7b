"""TLS on every port, clients with certificates, and files that are read again. Certificates are real ones."""

import contextlib
import hashlib
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request

import grpc
import pytest
import server_harness as harness
from shell import jblock_client

from jblock.engine.process.mock import build_engine
from serving.client import Client
from serving.client_tls import TLS
from serving.tenants import Tenant, Tenants
from serving.tenants_file import TenantsFile
from serving.tls import Certificates
from serving.v1 import jblock_pb2_grpc
from serving.values import ClientError


def openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


class Authority:
    """Signs certificates in a folder."""

    def __init__(self, folder, name="ca"):
        self.folder, self.cert, self.key = folder, folder / f"{name}.pem", folder / f"{name}.key"
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", 2, "-subj", f"/CN={name}", "-keyout", self.key, "-out", self.cert),
        )

    def sign(self, name, san):
        """A certificate and its key, as files of this name."""
        key, request = self.folder / f"{name}.key", self.folder / f"{name}.csr"
        cert, extension = self.folder / f"{name}.pem", self.folder / f"{name}.ext"
        openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", key, "-out", request),
        )
        extension.write_text(f"subjectAltName={san}\n")
        openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key),
            *("-CAcreateserial", "-days", 2, "-out", cert, "-extfile", extension),
        )
        return TLS(ca_file=str(self.cert), cert_file=str(cert), key_file=str(key))


def fingerprint(tls):
    with open(tls.cert_file) as file:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(file.read())).hexdigest()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server_tls(authority):
    return authority.sign("server", "DNS:localhost,IP:127.0.0.1")


@pytest.fixture(scope="module")
def spiffe(authority):
    return authority.sign("acme", "URI:spiffe://prod/acme,DNS:acme.internal")


def certificates(tls, ca=None):
    return Certificates(tls.cert_file, tls.key_file, ca)


def get(port, path, tls, key=None, own=True):
    """Status of a GET over TLS."""
    context = ssl.create_default_context(cafile=tls.ca_file)
    if own:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"https://localhost:{port}{path}", None, headers)
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def rejected(call):
    """Whether a call fails before anybody answers it."""
    try:
        call()
    except ClientError as error:
        return error.code == "UNAVAILABLE"
    except (OSError, ssl.SSLError):
        return True
    return False


KEY = "a-key-that-is-long-enough"
KEYED = (hashlib.sha256(KEY.encode()).digest(), Tenant(name="keyed", admin=True))


@pytest.fixture
def running(tmp_path, authority, server_tls):
    """All ports with TLS; one tenant by its key, one by its certificate."""
    path = tmp_path / "auth.json"
    write(path, [])
    with harness.serving(
        build_engine(),
        tls=certificates(server_tls, str(authority.cert)),
        tenants=TenantsFile(str(path)),
        mtls_port=0,
        http_port=0,
        http_mtls_port=0,
        metrics_port=0,
        metrics_auth=True,
    ) as one:
        one.path = path
        yield one


def write(path, revoked):
    tenants = [
        {"name": "keyed", "key_sha256": hashlib.sha256(KEY.encode()).hexdigest(), "admin": True},
        {"name": "acme", "identities": ["uri:spiffe://prod/acme"]},
    ]
    path.write_text(json.dumps({"tenants": tenants, "revoked": revoked}))
    path.chmod(0o600)


def test_every_port_is_encrypted(running, authority, server_tls):
    trusting = TLS(ca_file=str(authority.cert))
    target = f"localhost:{running.server.port}"
    with Client(target, timeout=20.0, key=KEY, tls=trusting) as client:
        assert client.generate("echo", [7], max_tokens=1).token_ids == (7,)
    with Client(target, timeout=5.0, key=KEY) as client:
        assert rejected(client.models)
    with Client(target, timeout=5.0, key=KEY, tls=True) as client:
        assert rejected(client.models)  # The system does not know our authority.
    server = running.server
    assert get(server.http_port, "/v1/models", server_tls, KEY, own=False) == 200
    assert get(server.http_port, "/v1/models", server_tls, own=False) == 401
    assert get(server.metrics_port, "/metrics", server_tls, KEY, own=False) == 200
    assert get(server.metrics_port, "/metrics", server_tls, own=False) == 401


def test_a_certificate_says_who_asks(running, authority, spiffe, server_tls):
    server = running.server
    target = f"localhost:{server.mtls_port}"
    seen = []
    original = running.engine.submit
    running.engine.submit = lambda r: (seen.append(r.tenant), original(r))
    with Client(target, timeout=20.0, tls=spiffe) as client:
        assert client.generate("echo", [7], max_tokens=1).token_ids == (7,)
        assert [c.token_ids for c in client.stream("echo", [7], max_tokens=1)] == [(7,)]
        assert client.health() == "SERVING"
        with pytest.raises(ClientError, match="PERMISSION_DENIED: tenant acme may not"):
            client.unload("echo")
    # One that no tenant has says nothing, but a key does.
    stranger = authority.sign("stranger", "DNS:stranger")
    with Client(target, timeout=20.0, tls=stranger, key=KEY) as client:
        client.generate("echo", [7], max_tokens=1)
    with (
        Client(target, timeout=20.0, tls=stranger) as client,
        pytest.raises(ClientError, match="UNAUTHENTICATED"),
    ):
        client.models()
    assert seen == ["acme", "acme", "keyed"]
    assert get(server.http_mtls_port, "/v1/models", spiffe) == 200
    assert get(server.http_mtls_port, "/v1/models", stranger) == 401
    assert get(server.http_mtls_port, "/v1/models", stranger, KEY) == 200


def test_without_a_certificate_of_ours_nobody_connects(running, tmp_path, authority, server_tls):
    target = f"localhost:{running.server.mtls_port}"
    foreign = Authority(tmp_path, "other").sign("acme", "URI:spiffe://prod/acme")
    mixed = TLS(ca_file=str(authority.cert), cert_file=foreign.cert_file, key_file=foreign.key_file)
    for tls in (TLS(ca_file=str(authority.cert)), mixed):
        with Client(target, timeout=5.0, key=KEY, tls=tls) as client:
            assert rejected(client.models)
    port = running.server.http_mtls_port
    assert rejected(lambda: get(port, "/v1/models", server_tls, KEY, own=False))
    assert rejected(lambda: get(port, "/v1/models", mixed, KEY))


def test_methods_that_do_not_exist_are_told_to_nobody(running, authority, spiffe):
    target = f"localhost:{running.server.mtls_port}"
    stranger = authority.sign("nobody", "DNS:nobody")
    for tls, code in (
        (stranger, grpc.StatusCode.UNAUTHENTICATED),
        (spiffe, grpc.StatusCode.UNIMPLEMENTED),
    ):
        files = [open(p, "rb").read() for p in (tls.ca_file, tls.key_file, tls.cert_file)]  # noqa: SIM115
        with grpc.secure_channel(target, grpc.ssl_channel_credentials(*files)) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/jblock.v1.Inference/Nothing", None, None)(b"")
            assert caught.value.code() is code


def test_a_revoked_certificate_ends_with_the_next_call(running, spiffe):
    target = f"localhost:{running.server.mtls_port}"
    with Client(target, timeout=20.0, tls=spiffe) as client:
        assert client.models()
        digits = fingerprint(spiffe).upper()
        write(running.path, [":".join(digits[i : i + 2] for i in range(0, 64, 2))])

        def refused():
            with contextlib.suppress(ClientError):
                client.models()
                return False
            return True

        assert harness.eventually(refused)  # On the connection that it had.
        with pytest.raises(ClientError, match="UNAUTHENTICATED: certificate: is revoked"):
            client.models()
    assert get(running.server.http_mtls_port, "/v1/models", spiffe) == 401
    # Keys of its tenant, or of others, do not help whoever has it.
    assert get(running.server.http_mtls_port, "/v1/models", spiffe, KEY) == 401


def test_certificates_are_read_again(tmp_path, authority):
    shown = {}
    first, second = (authority.sign(name, "DNS:localhost") for name in ("first", "second"))
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def install(tls, wrong=None):
        cert.write_bytes(open(tls.cert_file, "rb").read())  # noqa: SIM115
        key.write_bytes(open((wrong or tls).key_file, "rb").read())  # noqa: SIM115
        later = time.time() + len(shown) + 1
        os.utime(cert, (later, later))
        shown[len(shown)] = tls

    install(first)
    loaded = Certificates(str(cert), str(key))

    def name_of(port):
        context = ssl.create_default_context(cafile=str(authority.cert))
        with (
            contextlib.closing(__import__("socket").create_connection(("localhost", port))) as raw,
            context.wrap_socket(raw, server_hostname="localhost") as one,
        ):
            return dict(part[0] for part in one.getpeercert()["subject"])["commonName"]

    with harness.serving(build_engine(), tls=loaded, http_port=0) as running:
        port = running.server.http_port
        grpc_port = running.server.port
        assert name_of(port) == name_of(grpc_port) == "first"
        install(second)
        assert harness.eventually(lambda: name_of(port) == name_of(grpc_port) == "second")
        install(first, wrong=second)  # A certificate and the key of another: refused whole.
        assert harness.eventually(lambda: loaded.files.refusals > 0)
        assert name_of(port) == name_of(grpc_port) == "second"


def test_files_that_are_no_certificates(tmp_path, server_tls):
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"tls_cert_file: .* are no"):
        Certificates(str(empty), server_tls.key_file)
    with pytest.raises(ValueError, match=r"tls_cert_file: .* are no"):
        Certificates(server_tls.cert_file, server_tls.key_file, str(empty))
    with pytest.raises(OSError):
        Certificates(str(tmp_path / "none"), server_tls.key_file)
    with pytest.raises(ValueError, match="tls: cert_file and key_file belong together"):
        TLS(cert_file="x")


def test_ports_for_certificates_need_an_authority(server_tls):
    for config in ({"mtls_port": 0}, {"http_mtls_port": 0, "tls": certificates(server_tls)}):
        with (
            pytest.raises(ValueError, match="mtls_port: needs tls_cert_file"),
            harness.serving(build_engine(), **config),
        ):
            pass
    with (
        pytest.raises(ValueError, match="metrics_auth: needs auth_file"),
        harness.serving(build_engine(), metrics_auth=True),
    ):
        pass


def test_the_shell_client_with_a_certificate(running, spiffe):
    flags = [f"--{name}={getattr(spiffe, name.removeprefix('tls_'))}" for name in _FILES]
    target = f"--target=localhost:{running.server.mtls_port}"
    listed = jblock_client(target, *flags, "models")
    assert listed.stdout.startswith("echo@1"), listed.stderr


_FILES = ("tls_ca_file", "tls_cert_file", "tls_key_file")


def test_reflection_needs_a_certificate_too(running, spiffe):
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    files = [
        open(p, "rb").read()  # noqa: SIM115
        for p in (spiffe.ca_file, spiffe.key_file, spiffe.cert_file)
    ]
    target = f"localhost:{running.server.mtls_port}"
    with grpc.secure_channel(target, grpc.ssl_channel_credentials(*files)) as channel:
        services = list(ProtoReflectionDescriptorDatabase(channel).get_services())
        assert "jblock.v1.Inference" in services
        assert jblock_pb2_grpc.InferenceStub(channel)
    assert Tenants([KEYED]).required
