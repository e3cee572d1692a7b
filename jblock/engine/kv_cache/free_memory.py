"""How much memory is free for KV pages and weights."""

import contextlib
import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import jax

# Of the free RAM of a machine others use too, and never more than a user would expect to miss.
CPU_FRACTION = 0.5
CPU_MOST_BYTES = 10**9
# Of a device that is this agent's own; the rest is for what the allocator cannot pack.
DEVICE_FRACTION = 0.9


def kv_budget(devices: Sequence[jax.Device] = ()) -> int:
    """Bytes on each device for its part of the KV pools and what programs need beside them, of the
    memory that is free now.

    Args:
      devices: whose memory; none: jax's default one's.

    Raises:
      ValueError: a device does not say what it has.
    """
    devices = devices or jax.local_devices()[:1]
    if devices[0].platform == "cpu":
        return min(int(available_ram() * CPU_FRACTION), CPU_MOST_BYTES) // len(devices)
    return int(min(map(_free, devices)) * DEVICE_FRACTION)


def spare(devices: Sequence[jax.Device] = ()) -> int:
    """Bytes that weights may still take on all devices together, beside what is there."""
    devices = devices or jax.local_devices()[:1]
    if devices[0].platform == "cpu":
        return int(available_ram() * CPU_FRACTION)
    return int(sum(map(_free, devices)) * DEVICE_FRACTION)


def give_back() -> None:
    """Has the C library hand what was freed back to the system, where it can: reading weights and compiling
    leave much of it, which the library would keep."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _free(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        raise ValueError(
            f"{device.device_kind} does not report its free memory: give kv_memory_mb, the memory "
            "of the KV cache"
        )
    return stats["bytes_limit"] - stats["bytes_in_use"]


def available_ram(root: Path = Path("/")) -> int:
    """Bytes that processes can still get without swapping, limits of the control groups included.

    Args:
      root: where proc and sys are mounted.
    """
    free = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    free.extend(_cgroup_rooms(root))
    if not free:  # No Linux: half of what there is.
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(min(free), 0)


def _cgroup_rooms(root: Path) -> list[int]:
    """What each limit above this process leaves, version 1 or 2."""
    rooms = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                base = root / "sys/fs/cgroup/memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            folder = base / path.lstrip("/")
            # In a container the path may be the host's; its own limit then lies at the base.
            for group in (folder, *folder.parents):
                if base in (group, *group.parents):
                    rooms.extend(_room(group, *names))
    return rooms


def _room(group: Path, limit: str, usage: str) -> list[int]:
    """[limit - usage] of one group, file cache that can be dropped not counted; [] without one."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max" is no limit.
        room = int((group / limit).read_text()) - int((group / usage).read_text())
        with contextlib.suppress(OSError):
            for line in (group / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name in ("inactive_file", "total_inactive_file"):
                    return [room + int(value)]
        return [room]
    return []
