"""From what a request wants its answer to keep to, to a grammar that is known to be one."""

import asyncio
import collections
import hashlib
from collections.abc import Mapping
from typing import Any

from serving.child_processes import ChildError, ChildProcesses
from serving.errors import RequestError, invalid, unavailable
from serving.tenants import Tenant
from serving.v1 import jblock_pb2 as pb

# CPU time of building one grammar, which takes some milliseconds.
VETTING_SECONDS = 0.35
_MAX_PROCESSES = 2
# Behind others' grammars.
_WAIT_SECONDS = 20.0
MAX_SOURCE_BYTES = 128 * 1024
MAX_CHOICES = 1000
_KEPT = 256


class Grammars:
    """Vets the grammars of one server. A tenant's are vetted one at a time, so that they hold up nobody
    else's, and what is known of them is kept apart, so that nobody learns what others ask."""

    def __init__(self, seconds: float = VETTING_SECONDS):
        """`seconds` is the CPU time that building one may take."""
        first = {"kind": "regex", "source": "a"}
        module = "serving.structured.vetting_child"
        self._children = ChildProcesses(module, first, seconds, _MAX_PROCESSES)
        self._known: collections.OrderedDict[bytes, str | RequestError] = collections.OrderedDict()
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}

    async def find(self, wanted: pb.StructuredOutput, tenant: Tenant, field: str) -> str:
        """The grammar for the engine; "" where nothing is wanted.

        Args:
          wanted: by the request.
          tenant: who asks.
          field: of the request that wants it, for errors.

        Raises:
          RequestError: it is none, or takes too long.
        """
        kind = wanted.WhichOneof("kind")
        if kind is None:
            return ""
        request = _request(wanted, kind, field)
        key = hashlib.sha256(repr((tenant.name, tenant.cache_salt, field, request)).encode())
        digest = key.digest()
        if digest not in self._known:
            try:
                async with asyncio.timeout(_WAIT_SECONDS):
                    await self._vet(digest, request, tenant, field)
            except TimeoutError as error:
                raise unavailable(
                    f"server: others' grammars are being looked at, for {_WAIT_SECONDS:g} s; try again"
                ) from error
        found = self._known[digest]
        self._known.move_to_end(digest)
        if isinstance(found, RequestError):
            raise RequestError(found.code, found.message)
        return found

    async def close(self) -> None:
        """Ends the processes."""
        await self._children.close()

    async def _vet(
        self, digest: bytes, request: Mapping[str, Any], tenant: Tenant, field: str
    ) -> None:
        lock, waiting = self._turns.get(tenant.name, (asyncio.Lock(), 0))
        self._turns[tenant.name] = lock, waiting + 1
        try:
            async with lock:
                if digest in self._known:
                    return
                try:
                    reply = await self._children.ask(request)
                except ChildError as error:
                    reply = {"error": f"{error}; make it simpler"}
                if "error" in reply:
                    self._keep(digest, invalid(f"{field}: {reply['error']}"))
                else:
                    self._keep(digest, reply["grammar"])
        finally:
            lock, waiting = self._turns[tenant.name]
            self._turns[tenant.name] = lock, waiting - 1
            if waiting == 1:
                del self._turns[tenant.name]

    def _keep(self, digest: bytes, found: str | RequestError) -> None:
        self._known[digest] = found
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)


def _request(wanted: pb.StructuredOutput, kind: str, field: str) -> dict[str, Any]:
    """The message to the process that looks at it."""
    if kind == "choice":
        choices = list(wanted.choice.texts)
        if not choices or not all(choices):
            raise invalid(f"{field}: needs choices, and none of them empty; send some texts")
        if len(choices) > MAX_CHOICES:
            raise invalid(f"{field}: has {len(choices)} choices, at most {MAX_CHOICES} are taken")
        size = sum(len(text.encode()) for text in choices)
        source: str | list[str] = choices
    else:
        text: str = getattr(wanted, kind)
        source, size = text, len(text.encode())
        if not text:
            raise invalid(f"{field}: is empty; leave it out, or send a {kind}")
    if size > MAX_SOURCE_BYTES:
        raise invalid(
            f"{field}: has {size} bytes, at most {MAX_SOURCE_BYTES} are taken; shorten it"
        )
    return {"kind": kind, "source": source}
