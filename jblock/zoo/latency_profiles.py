"""Profiles in a zoo: what blocks take on one target, measured by `jblock convert profile`.

`profiles/<target>/profile.json` holds, for every signature, seconds by grid, and what follows from them: the
cost of one more call and the rate at which weights are read.
"""

import dataclasses
import functools
import hashlib
import platform
import re
from pathlib import Path
from typing import Any

from jblock.zoo import codec
from jblock.zoo.records import ZooError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What a target was measured to take.

    Attributes:
      hop_seconds: one call of a block that does next to nothing.
      bytes_per_second: of weights, in decoding one row.
      signatures: one dict a signature: `signature` (its name), `key` (a digest of it), `bytes`,
        `load_seconds`, and `times`, dicts of `num_seqs`, `q_len`, `context` and `seconds`.
    """

    hop_seconds: float
    bytes_per_second: float
    signatures: tuple[dict[str, Any], ...]


def target(device: str = "cpu") -> str:
    """The name of this machine's kind of device, as a folder."""
    text = f"{device}-{_processor()}" if device == "cpu" else device
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def read(folder: Path, of: str) -> Profile | None:
    """The profile of a target; None if there is none or it cannot be believed."""
    path = folder / of / "profile.json"
    if not path.is_file():
        return None
    try:
        data = codec.read_json(path)
        found = Profile(
            hop_seconds=float(data["hop_seconds"]),
            bytes_per_second=float(data["bytes_per_second"]),
            signatures=tuple(data["signatures"]),
        )
    except (ZooError, KeyError, TypeError, ValueError):
        return None  # measured anew; nothing else relies on it
    positive = 0 < found.hop_seconds < 1 and found.bytes_per_second > 0
    return found if positive else None


@functools.cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    fields = dict(re.findall(r"^(model name|flags)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    features = hashlib.sha256(fields.get("flags", "").encode()).hexdigest()[:6]
    return f"{name}-{features}"
