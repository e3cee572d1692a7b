"""The file of tenants. It holds digests of keys, never keys, so reading it gives nobody access; writing it
does, which is why a file that others may write is refused."""

import hashlib
import hmac
import json
import math
import os
import re
import secrets
import stat
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serving.reloading import ReloadedFiles
from serving.tenants import Roster, Tenant, Tenants

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_IDENTITY = re.compile(r"(uri|dns|cn|sha256):.{1,512}")
# Names become labels of metrics and rows of counters.
_MAX_TENANTS = 10_000
_MAX_PATTERNS = 1000

# Fields that are whole numbers, and the least of each.
_NUMBERS = {
    "max_requests": 1,
    "requests_per_minute": 1,
    "tokens_per_minute": 1,
    "max_prompt_tokens": 1,
    "max_output_tokens": 1,
    "priority_ceiling": -(2**31),
}
_FIELDS = (
    "name",
    "key_sha256",
    "identities",
    "admin",
    "weight",
    "models",
    *_NUMBERS,
    "share_cache",
)


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


class TenantsFile(Tenants):
    """The tenants of a file, which may be written anew at any time.

    Attributes:
      files: reads it again.
    """

    def __init__(self, path: str):
        """Reads it, JSON or TOML by its name; docs/tenants.md describes it.

        Raises:
          ValueError: it cannot be trusted or understood; the message never has a value of key_sha256, which
            may be a key put there by mistake.
          OSError: it cannot be read.
        """
        super().__init__()
        # Salts last as long as the process, like the cache they divide.
        secret = secrets.token_bytes(32)

        def read() -> None:
            self.roster = _load(path, secret)

        self.files = ReloadedFiles("auth_file", [path], read)


def _load(path: str, secret: bytes) -> Roster:
    parse = _PARSERS.get(os.path.splitext(path)[1])
    if parse is None:
        raise ValueError(f"auth_file: {path!r} is neither .json nor .toml; name it by its format")
    try:
        content = parse(_read(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"auth_file: {path} cannot be read: {error}") from error
    listed = content.get("tenants") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not 0 < len(listed) <= _MAX_TENANTS:
        raise ValueError(
            f"auth_file: {path} has no list 'tenants'; give at least one tenant, "
            f"and at most {_MAX_TENANTS}"
        )
    unknown = sorted(set(content) - {"tenants", "revoked"})
    if unknown:
        raise ValueError(f"auth_file: {unknown[0]}: is no field; there are tenants, revoked")
    digests: dict[bytes, Tenant] = {}
    identities: dict[str, Tenant] = {}
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
        for identity in tenant.identities:
            if identity in identities:
                raise ValueError(f"{where}.identities: {identity!r} is there twice; leave one")
            identities[identity] = tenant
    return Roster(tuple(digests.items()), identities, _revoked(content.get("revoked", [])))


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
    name = fields.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{where}.name: {name!r} is no name; give up to 64 letters, digits, '.', '_', '-'"
        )
    identities = _strings(f"{where}.identities", fields.get("identities", []))
    for identity in identities:
        if not _IDENTITY.fullmatch(identity):
            raise ValueError(
                f"{where}.identities: {identity!r} is none; give uri:..., dns:..., cn:... or sha256:..."
            )
    admin, share = fields.get("admin", False), fields.get("share_cache", False)
    for field, value in (("admin", admin), ("share_cache", share)):
        if not isinstance(value, bool):
            raise ValueError(f"{where}.{field}: {value!r} is neither true nor false")
    # All who share are one to the cache; a name of a tenant is never empty.
    salted = b"" if share else name.encode()
    tenant = Tenant(
        name=name,
        admin=admin,
        weight=_weight(where, fields.get("weight", 1.0)),
        models=_strings(f"{where}.models", fields.get("models", ["*"])),
        identities=tuple(_normal(identity) for identity in identities),
        cache_salt=hmac.new(secret, salted, hashlib.sha256).hexdigest(),
        **{f: _number(where, f, fields[f]) for f in _NUMBERS if fields.get(f) is not None},
    )
    return tenant, _keys(where, fields.get("key_sha256"), needed=not identities)


def _keys(where: str, keys: Any, needed: bool) -> list[bytes]:
    """The digests of an entry's keys; one with identities needs none."""
    keys = [keys] if isinstance(keys, str) else keys
    if not needed and keys is None:
        return []
    if not isinstance(keys, list) or not keys:
        raise ValueError(f"{where}.key_sha256: is missing; give a digest, or a list of them")
    if not all(isinstance(k, str) and _DIGEST.fullmatch(k) for k in keys):
        raise ValueError(
            f"{where}.key_sha256: is not the 64 hex digits of a digest; "
            'make one: printf %s "$KEY" | sha256sum'
        )
    return [bytes.fromhex(k) for k in keys]


def _weight(where: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 0.001 <= value <= 1000:
        raise ValueError(f"{where}.weight: {value!r} is no number from 0.001 to 1000")
    return float(value)


def _number(where: str, field: str, value: Any) -> int:
    least = _NUMBERS[field]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
        raise ValueError(f"{where}.{field}: {value!r} is no whole number of at least {least}")
    return value


def _strings(where: str, value: Any) -> tuple[str, ...]:
    if (
        not isinstance(value, list)
        or len(value) > _MAX_PATTERNS
        or not all(isinstance(v, str) and v for v in value)
    ):
        raise ValueError(f"{where}: is no list of at most {_MAX_PATTERNS} texts")
    return tuple(value)


def _revoked(value: Any) -> frozenset[str]:
    if not isinstance(value, Sequence) or not all(
        isinstance(v, str) and _DIGEST.fullmatch(v.replace(":", "")) for v in value
    ):
        raise ValueError(
            "auth_file: revoked: is no list of sha256 fingerprints of certificates; "
            "openssl x509 -noout -fingerprint -sha256 -in FILE prints one"
        )
    return frozenset(v.replace(":", "").lower() for v in value)


def _normal(identity: str) -> str:
    """A fingerprint in lower-case hex, whichever way it was written; other identities as they are."""
    kind, _, rest = identity.partition(":")
    return f"sha256:{rest.replace(':', '').lower()}" if kind == "sha256" else identity
