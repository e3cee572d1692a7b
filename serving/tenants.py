"""Who may use a server: its tenants, the keys and certificates that they prove it with, and what each may do.

A key is a long random string, not a password: one round of sha256 is enough.
"""

import dataclasses
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable, Mapping

import grpc

from serving.errors import RequestError
from serving.reloading import ReloadedFiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tenant:
    """An authenticated user of the service.

    Attributes:
      name: for messages, the log and metrics.
      admin: may change which models are served.
      weight: its share of a server that others want too, in proportion to theirs.
      models: names that it may ask for, with * and ? as in a shell.
      max_requests: most requests it may have open at once; None: half of the server's queue.
      requests_per_minute: most calls that generate; None: any number.
      tokens_per_minute: most tokens of prompts and answers; None: any number.
      max_prompt_tokens: of one prompt; None: as many as the model takes.
      max_output_tokens: of one answer; None: as many as the model gives.
      priority_ceiling: the most urgent priority that it may ask for: lower numbers go first.
      identities: of certificates that stand for it, as `Peer` has them.
      cache_salt: cached prompts are shared between requests of equal salt only.
    """

    name: str
    admin: bool = False
    weight: float = 1.0
    models: tuple[str, ...] = ("*",)
    max_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    priority_ceiling: int = 0
    identities: tuple[str, ...] = ()
    cache_salt: str = ""

    def may_use(self, model: str) -> bool:
        """Whether it may ask for a model."""
        return any(fnmatch.fnmatchcase(model, pattern) for pattern in self.models)


# Everybody, where the server asks for no keys: bounded by the queue alone.
ANONYMOUS = Tenant(name="", admin=True, max_requests=2**31, priority_ceiling=-(2**31))


@dataclasses.dataclass(frozen=True)
class Peer:
    """The certificate of a client, which an authority of ours has signed.

    Attributes:
      identities: what it says of its owner, what tells most first: "sha256:<digest>", "uri:spiffe://...",
        "dns:...", "cn:...".
      fingerprint: sha256 of it, in lower-case hex.
    """

    identities: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Roster:
    """What a file of tenants says.

    Attributes:
      digests: sha256 of a key, and whose it is.
      identities: of certificates, and whose they are.
      revoked: fingerprints of certificates that nobody may use any more.
    """

    digests: tuple[tuple[bytes, Tenant], ...] = ()
    identities: Mapping[str, Tenant] = dataclasses.field(default_factory=dict)
    revoked: frozenset[str] = frozenset()


class Tenants:
    """The tenants of a server, found by what a call brings. Its roster may be replaced at any time; whoever
    was let in goes on.

    Attributes:
      roster: who they are.
      files: what it is read from; None: nothing.
    """

    files: ReloadedFiles | None = None

    def __init__(self, digests: Iterable[tuple[bytes, Tenant]] = ()):
        """Takes (sha256 of a key, its tenant) pairs; without any, everybody is ANONYMOUS."""
        self.roster = Roster(tuple(digests))

    @property
    def required(self) -> bool:
        """Whether a call needs a key or a certificate."""
        return bool(self.roster.digests or self.roster.identities)

    def find(
        self, metadata: Iterable[tuple[str, str | bytes]] | None, peer: Peer | None = None
    ) -> Tenant:
        """The tenant of a call: that of its certificate, or of the key in its metadata.

        Raises:
          RequestError: UNAUTHENTICATED, there is none.
        """
        roster = self.roster
        if peer is not None:
            if peer.fingerprint in roster.revoked:
                raise RequestError(
                    grpc.StatusCode.UNAUTHENTICATED,
                    "certificate: is revoked; ask the operator for another one",
                )
            for identity in peer.identities:
                if identity in roster.identities:
                    return roster.identities[identity]
        if not self.required:
            return ANONYMOUS
        given = [value for name, value in metadata or () if name == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            raise _unauthenticated(f"{len(given)} headers were sent; send one")
        scheme, _, key = given[0].partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _unauthenticated("the header has another form; send it as written here")
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        found = None
        for known, tenant in roster.digests:  # All of them: the time must not tell which one fits.
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise _unauthenticated("no tenant has this key; ask the operator for one")
        return found


EVERYBODY = Tenants()


def _unauthenticated(problem: str) -> RequestError:
    return RequestError(
        grpc.StatusCode.UNAUTHENTICATED, f"metadata: needs 'authorization: Bearer KEY'; {problem}"
    )
