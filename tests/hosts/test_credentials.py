"""Who knows whom: secrets and certificates, over real connections."""

import datetime
import os
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from host_agents import free_address, secret_file

from jblock.hosts import credentials, streams
from jblock.hosts.credentials import from_files


@pytest.fixture(autouse=True)
def other_processes():
    """What one process makes of a secret is not another's."""
    credentials._of_secret.cache_clear()


def echo(stream: streams.Stream) -> None:
    while True:
        try:
            stream.send(stream.receive())
        except streams.StreamEnded:
            return


def certificates(folder, authority: str, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Files of an operator's own authority, and of a certificate for each name."""
    made = {}
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, authority)])

    def signed(name, key, extension):
        now = datetime.datetime(2020, 1, 1)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(ca_name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now.replace(year=2900))
        builder = builder.add_extension(extension, critical=False)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    ca_file = folder / f"{authority}.pem"
    ca_file.write_bytes(signed(ca_name, ca_key, x509.BasicConstraints(True, None)))
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        san = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        files = {n: folder / f"{authority}-{name}.{n}" for n in ("cert", "key")}
        files["key"].touch(0o600)
        files["cert"].write_bytes(signed(subject, key, san))
        files["key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        made[name] = {
            "tls_cert_file": str(files["cert"]),
            "tls_key_file": str(files["key"]),
            "tls_ca_file": str(ca_file),
        }
    return made


def says(address: str, files: dict[str, str]) -> bytes:
    """What comes back over a new stream."""
    stream = streams.connect(address, "echo", from_files(files))
    try:
        stream.send(b"hello")
        return stream.receive()
    finally:
        stream.close()


def test_only_who_has_the_secret_or_a_certificate_gets_a_stream(tmp_path):
    ours, theirs = ({"secret_file": secret_file(tmp_path, n, n * 40)} for n in "ab")
    operators = certificates(tmp_path, "ours", ("server", "client"))
    strangers = certificates(tmp_path, "others", ("client",))
    for listens, friend, others in (
        (ours, ours, (theirs, operators["client"])),
        (operators["server"], operators["client"], (ours, strangers["client"])),
    ):
        address = free_address().replace("127.0.0.1", "localhost")
        server = streams.StreamServer(address, {"echo": echo}, from_files(listens))
        try:
            credentials._of_secret.cache_clear()
            assert says(address, friend) == b"hello"
            for other in others:
                with pytest.raises(streams.StreamEnded):
                    says(address, other)
            assert says(address, friend) == b"hello"
        finally:
            server.close()


def test_a_port_that_is_taken_is_named(tmp_path):
    known, address = from_files({"secret_file": secret_file(tmp_path)}), free_address()
    server = streams.StreamServer(address, {}, known)
    with pytest.raises(ValueError, match=f"listen: cannot listen on {address}"):
        streams.StreamServer(address, {}, known)
    server.close()


def test_who_takes_nothing_is_left_and_nothing_piles_up(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE_SECONDS", 0.2)
    known, address = from_files({"secret_file": secret_file(tmp_path)}), free_address()
    sent, ended = [], threading.Event()

    def flood(stream):
        try:
            while True:
                stream.send(bytes(2**20))
                sent.append(1)
        except streams.StreamEnded:
            ended.set()

    server = streams.StreamServer(address, {"flood": flood}, known)
    stream = streams.connect(address, "flood", known)
    assert ended.wait(60)
    assert len(sent) < 200
    stream.close()
    server.close()


@pytest.mark.parametrize(
    "files,message",
    [
        ({}, "give it alone, or tls_cert_file"),
        ({"tls_cert_file": "x"}, "give it alone"),
        ({"secret_file": "open"}, r"may be read by others \(644\); chmod 600 it"),
        ({"secret_file": "short"}, "has 5 bytes, which may be guessed; make one of 32"),
        ({"tls_cert_file": "s", "tls_key_file": "s", "tls_ca_file": "s"}, "not PEM"),
    ],
)
def test_bad_credentials_are_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    secret_file(tmp_path, "short", "12345")
    secret_file(tmp_path, "s")
    os.chmod(secret_file(tmp_path, "open"), 0o644)
    with pytest.raises(ValueError, match=message):
        from_files(files)


def test_the_key_of_another_certificate_is_refused(tmp_path):
    made = certificates(tmp_path, "ours", ("a", "b"))
    mixed = {**made["a"], "tls_key_file": made["b"]["tls_key_file"]}
    with pytest.raises(ValueError, match="is not the key of tls_cert_file"):
        from_files(mixed)
