"""`POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them, for admins."""

import grpc
import msgspec

from serving.changes import Changes
from serving.errors import RequestError, invalid
from serving.http.calls import Call
from serving.http.exchange import decode


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which adapter to serve. There is none by a path: what is served comes from the zoo."""

    lora_name: str
    lora_path: str | None = None
    load_inplace: bool | None = None


class UnloadRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which adapter to serve no more."""

    lora_name: str
    lora_int_id: int | None = None


class Adapters:
    """Answers them."""

    def __init__(self, changes: Changes):
        self._changes = changes

    async def load(self, call: Call) -> None:
        """Serves an adapter, or another model, of the zoo too; or its active version from now on."""
        fields = decode(call.body, LoadRequest)
        _check_admin(call)
        if fields.lora_path not in (None, "", fields.lora_name):
            raise invalid(
                "lora_path: adapters are served from the zoo; add it with jblock-convert, and leave this out"
            )
        await self._changes.load(fields.lora_name, 0)
        await call.sender.json({"message": f"Success: LoRA adapter '{fields.lora_name}' added."})

    async def unload(self, call: Call) -> None:
        """Takes no more requests for it."""
        fields = decode(call.body, UnloadRequest)
        _check_admin(call)
        if fields.lora_int_id is not None:
            raise invalid("lora_int_id: adapters have names here; send lora_name alone")
        await self._changes.unload(fields.lora_name)
        await call.sender.json({"message": f"Success: LoRA adapter '{fields.lora_name}' removed."})


def _check_admin(call: Call) -> None:
    if not call.tenant.admin:
        raise RequestError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"tenant {call.tenant.name} may not change what is served; its entry in --auth_file needs "
            "admin = true",
        )
