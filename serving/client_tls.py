"""TLS of our clients."""

import dataclasses

import grpc


@dataclasses.dataclass(frozen=True, kw_only=True)
class TLS:
    """Whom a client trusts, and what it shows of itself; all files in PEM.

    Attributes:
      ca_file: the authority of the server's certificate; None: those that the system trusts.
      cert_file: the client's own certificate, where the server asks for one.
      key_file: its private key.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __post_init__(self):
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("tls: cert_file and key_file belong together; give both, or none")


def client_credentials(tls: bool | TLS) -> grpc.ChannelCredentials:
    """What a channel takes.

    Raises:
      OSError: a file cannot be read.
    """
    given = tls if isinstance(tls, TLS) else TLS()
    paths = (given.ca_file, given.key_file, given.cert_file)
    return grpc.ssl_channel_credentials(*(None if p is None else _bytes(p) for p in paths))


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
