"""How agents on several hosts, and the server that they work for, know each other: TLS in which each side
shows a certificate.

Certificates are the operator's, or are made of a secret that all of them have: the secret is stretched to
the key of an authority, which each side makes for itself, and each process has a certificate of that
authority with a key that never leaves its memory. Who does not know the secret has no certificate, and does
not get past the TLS handshake; what was recorded is of no use to anybody.
"""

import dataclasses
import datetime
import functools
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Whoever connects is shown a certificate and could try secrets on it, so no secret that can be guessed will
# do: 32 hexadecimal digits are 128 bits.
_FEWEST_BYTES = 32
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_NAME = "jblock-agent"
# Clocks of hosts need not agree.
_FROM, _UNTIL = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31)


@dataclasses.dataclass(frozen=True)
class Credentials:
    """What a process shows, and whom it believes; all in PEM.

    Attributes:
      certificate: its own, with those between it and the authority.
      key: its private key.
      authority: signs the certificates of all others.
      name: that others' certificates are for; "": the host that was connected to.
    """

    certificate: bytes
    key: bytes = dataclasses.field(repr=False)
    authority: bytes
    name: str = ""

    def of_server(self) -> grpc.ServerCredentials:
        """For a port that nobody else gets past."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.authority, require_client_auth=True
        )

    def of_client(self) -> grpc.ChannelCredentials:
        """For a connection to one."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    @property
    def channel_options(self) -> list[tuple[str, Any]]:
        """What such a connection needs beside them."""
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []


def from_files(files: Mapping[str, str], flags: str = "") -> Credentials:
    """Credentials of a file with a secret ("secret_file"), or of certificates ("tls_cert_file",
    "tls_key_file" and "tls_ca_file").

    Args:
      files: their paths by these names.
      flags: what the names of flags have in front of these, for what is said of them.

    Raises:
      ValueError: neither or both are given, or a file is none of these; a secret or key that others may read.
      OSError: a file cannot be read.
    """
    names = ("tls_cert_file", "tls_key_file", "tls_ca_file")
    secret = files.get("secret_file", "")
    given = [name for name in names if files.get(name)]
    if secret and not given:
        return _of_secret(_secret(flags, secret))
    if secret or len(given) < len(names):
        raise ValueError(
            f"{flags}secret_file: give it alone, or {_listed(flags, names)} together: agents and server must "
            "know each other"
        )
    certificate, key, authority = (Path(files[name]).read_bytes() for name in names)
    _check_private(f"{flags}tls_key_file", files["tls_key_file"])
    try:
        x509.load_pem_x509_certificates(authority)
        shown = x509.load_pem_x509_certificates(certificate)[0]
        private = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{_listed(flags, names)}: not PEM: {error}") from error
    if private.public_key() != shown.public_key():
        raise ValueError(f"{flags}tls_key_file: is not the key of {flags}tls_cert_file")
    return Credentials(certificate, key, authority)


def _listed(flags: str, names: Sequence[str]) -> str:
    return ", ".join(flags + name for name in names)


def _secret(flags: str, path: str) -> bytes:
    name = f"{flags}secret_file"
    _check_private(name, path)
    secret = Path(path).read_bytes().strip()
    if len(secret) < _FEWEST_BYTES:
        raise ValueError(
            f"{name}: {path} has {len(secret)} bytes, which may be guessed; make one of {_FEWEST_BYTES} "
            f"or more: (umask 077; openssl rand -hex 32 > {path})"
        )
    return secret


def _check_private(name: str, path: str) -> None:
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise ValueError(f"{name}: {path} may be read by others ({mode:03o}); chmod 600 it")


@functools.lru_cache(maxsize=4)
def _of_secret(secret: bytes) -> Credentials:
    stretched = HKDF(hashes.SHA256(), 48, None, b"jblock: authority of agents, 1").derive(secret)
    authority_key = ec.derive_private_key(
        int.from_bytes(stretched) % (_P256_ORDER - 1) + 1, ec.SECP256R1()
    )
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "jblock agents")])
    authority = (
        _certificate(authority_name, authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _certificate(own, authority_name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Credentials(certificate.public_bytes(pem), private, authority.public_bytes(pem), _NAME)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
    )
