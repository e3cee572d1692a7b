"""Who may use a server: its tenants, their keys, and what each may hold.

The file holds digests of keys, never keys, so reading it gives nobody access; writing it does, which
is why a file that others may write is refused. A key is a long random string, not a password: one
round of sha256 is enough.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from serving.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_FIELDS = ("name", "key_sha256", "admin", "max_requests")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose every name stands once; json.loads takes the last of several without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} stands twice in one object; leave one of them")
    return content


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": lambda text: json.loads(text, object_pairs_hook=_once),
    ".toml": tomllib.loads,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tenant:
    """An authenticated user of the service.

    Attributes:
      name: for messages and the log.
      admin: may change which models are served.
      max_requests: most requests it may have open at once; None: half of the server's queue.
      cache_salt: cached prompts are shared between requests of equal salt only.
    """

    name: str
    admin: bool = False
    max_requests: int | None = None
    cache_salt: str = ""


# Everybody, where the server asks for no keys: bounded by the queue alone.
ANONYMOUS = Tenant(name="", admin=True, max_requests=2**31)


class Tenants:
    """The tenants of a server, found by the key that a call brings."""

    def __init__(self, digests: Iterable[tuple[bytes, Tenant]] = ()):
        """Takes (sha256 of a key, its tenant) pairs; without any, everybody is ANONYMOUS."""
        self._digests = tuple(digests)

    @property
    def required(self) -> bool:
        """Whether a call needs a key."""
        return bool(self._digests)

    @classmethod
    def load(cls, path: str) -> "Tenants":
        """Reads a file of tenants, JSON or TOML by its name; docs/serving.md describes it.

        Raises:
          ValueError: it cannot be trusted or understood; the message never has a value of
            key_sha256, which may be a key put there by mistake.
          OSError: it cannot be read.
        """
        parse = _PARSERS.get(os.path.splitext(path)[1])
        if parse is None:
            raise ValueError(
                f"auth_file: {path!r} is neither .json nor .toml; name it by its format"
            )
        try:
            content = parse(_read(path))
        except ValueError as error:
            raise ValueError(f"auth_file: {path} cannot be read: {error}") from error
        listed = content.get("tenants") if isinstance(content, dict) else None
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"auth_file: {path} has no list 'tenants'; give at least one tenant")
        # Salts last as long as the process, like the cache they divide.
        secret = secrets.token_bytes(32)
        digests: dict[bytes, Tenant] = {}
        names: set[str] = set()
        for at, fields in enumerate(listed):
            where = f"auth_file: tenants[{at}]"
            tenant, keys = _tenant(where, fields, secret)
            if tenant.name in names:
                raise ValueError(f"{where}.name: {tenant.name!r} is there twice; rename one")
            names.add(tenant.name)
            for key in keys:
                if key in digests:
                    raise ValueError(f"{where}.key_sha256: is there twice; give each its own key")
                digests[key] = tenant
        return cls(digests.items())

    def find(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Tenant:
        """The tenant whose key a call's metadata has.

        Raises:
          RequestError: UNAUTHENTICATED, there is none.
        """
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
        for known, tenant in self._digests:  # All of them: the time must not tell which one fits.
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


def _read(path: str) -> str:
    """The text of a file that nobody but us and root can have written."""
    with open(path, encoding="utf-8") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
        if status.st_mode & 0o022:
            raise ValueError(f"its group or others may write it; run: chmod go-w {path}")
        if status.st_uid not in (0, os.geteuid()):
            raise ValueError(f"user {status.st_uid} owns it; it must be ours or root's")
        return file.read()


def _tenant(where: str, fields: Any, secret: bytes) -> tuple[Tenant, list[bytes]]:
    """One entry, checked, and the digests of its keys."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}: is no table of {', '.join(_FIELDS)}")
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise ValueError(f"{where}.{unknown[0]}: is no field; there are {', '.join(_FIELDS)}")
    name, keys = fields.get("name"), fields.get("key_sha256")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}.name: {name!r} is no name; give up to 64 letters, digits, '.', '_', '-'"
        )
    keys = [keys] if isinstance(keys, str) else keys
    if not isinstance(keys, list) or not keys:
        raise ValueError(f"{where}.key_sha256: is missing; give a digest, or a list of them")
    if not all(isinstance(k, str) and _DIGEST.fullmatch(k) for k in keys):
        raise ValueError(
            f"{where}.key_sha256: is not the 64 hex digits of a digest; "
            'make one: printf %s "$KEY" | sha256sum'
        )
    admin, most = fields.get("admin", False), fields.get("max_requests")
    if not isinstance(admin, bool):
        raise ValueError(f"{where}.admin: {admin!r} is neither true nor false")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ValueError(f"{where}.max_requests: {most!r} is no whole number of at least 1")
    tenant = Tenant(
        name=name,
        admin=admin,
        max_requests=most,
        cache_salt=hmac.new(secret, name.encode(), hashlib.sha256).hexdigest(),
    )
    return tenant, [bytes.fromhex(k) for k in keys]
