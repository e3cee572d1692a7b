"""TLS: the certificates of a server, and of its clients."""

import hashlib
import ssl
from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from serving.reloading import ReloadedFiles
from serving.tenants import Peer


class Certificates:
    """A server's certificate with its key, and the authorities of its clients' certificates. New connections
    get what the files say now; those that are open stay.

    Attributes:
      files: reads them again.
    """

    def __init__(self, cert_file: str, key_file: str, client_ca_file: str | None = None):
        """Reads them; all are in PEM.

        Raises:
          ValueError: certificate and key do not fit each other, or a file is none of these.
          OSError: one cannot be read.
        """
        self._paths = (cert_file, key_file, client_ca_file)
        self.files = ReloadedFiles("tls_cert_file", [p for p in self._paths if p], self._read)

    def _read(self) -> None:
        cert_file, key_file, ca_file = self._paths
        contents = [_bytes(path) if path else None for path in self._paths]
        made = {}
        for mutual in (False, True) if ca_file else (False,):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(["http/1.1"])
            try:
                # Never asks for a password: nobody would be there to type it.
                context.load_cert_chain(cert_file, key_file, password=lambda: "")
                if mutual:
                    context.load_verify_locations(ca_file)
                    context.verify_mode = ssl.CERT_REQUIRED
            except ssl.SSLError as error:
                raise ValueError(
                    f"tls_cert_file: {cert_file}, {key_file}{f' and {ca_file}' if mutual else ''} are no "
                    f"certificate, its key and authorities in PEM ({error.reason or error})"
                ) from error
            made[mutual] = context
        # All at once: a certificate and the key of another one serve nobody.
        self._made = made
        self._contents = tuple(contents)

    @property
    def asks_clients(self) -> bool:
        """Whether it knows which clients' certificates to trust."""
        return self._paths[2] is not None

    def http_context(self, mutual: bool) -> ssl.SSLContext:
        """What a listener takes; `mutual` asks its clients for certificates."""
        cert_file, key_file, ca_file = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(cert_file, key_file, password=lambda: "")
        if mutual:
            context.load_verify_locations(ca_file)
            context.verify_mode = ssl.CERT_REQUIRED

        def choose(connection: ssl.SSLObject, name: str | None, before: ssl.SSLContext) -> None:
            connection.context = self._made[mutual]

        context.sni_callback = choose
        return context

    def grpc_credentials(self, mutual: bool) -> grpc.ServerCredentials:
        """What a gRPC port takes."""
        given = [self._contents]

        def configuration() -> grpc.ServerCertificateConfiguration:
            cert, key, ca = given[0]
            roots = ca if mutual else None
            return grpc.ssl_server_certificate_configuration([(key, cert)], roots)

        def newer() -> grpc.ServerCertificateConfiguration | None:
            if given[0] is self._contents:
                return None
            given[0] = self._contents
            return configuration()

        return grpc.dynamic_ssl_server_credentials(configuration(), newer, mutual)


def peer_of_grpc(auth_context: Mapping[str, Iterable[bytes]]) -> Peer | None:
    """Whose certificate a gRPC call came with; None without one."""
    pem = next(iter(auth_context.get("x509_pem_cert", ())), None)
    if pem is None:
        return None

    def values(kind: str, name: str) -> list[str]:
        return [f"{kind}:{v.decode('utf-8', 'replace')}" for v in auth_context.get(name, ())]

    found = [
        *values("uri", "peer_uri"),
        *values("dns", "peer_dns"),
        *values("cn", "x509_common_name"),
    ]
    return _peer(found, ssl.PEM_cert_to_DER_cert(pem.decode()))


def peer_of_http(connection: ssl.SSLObject | None) -> Peer | None:
    """The same of an HTTP connection."""
    der = connection.getpeercert(binary_form=True) if connection else None
    if connection is None or not der:
        return None
    certificate: Mapping[str, Any] = connection.getpeercert() or {}
    names = certificate.get("subjectAltName", ())
    found = [f"uri:{value}" for kind, value in names if kind == "URI"]
    found += [f"dns:{value}" for kind, value in names if kind == "DNS"]
    for part in certificate.get("subject", ()):
        found += [f"cn:{value}" for key, value in part if key == "commonName"]
    return _peer(found, der)


def _peer(identities: list[str], der: bytes) -> Peer:
    fingerprint = hashlib.sha256(der).hexdigest()
    return Peer((f"sha256:{fingerprint}", *identities), fingerprint)


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
