"""How large the KV pools are: as somebody said, or a share of what is free."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jblock.engine.config import EngineConfig
from jblock.engine.kv_cache.spec import KVShape, PoolShape
from jblock.pallas_kernels.paged_attention.api import backend_of
from jblock.parallel.placement import Placement
from jblock.parallel.spread import kv_heads

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


def _free(device: jax.Device) -> int:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "bytes_in_use" not in stats:
        raise ValueError(
            f"{device.device_kind} does not report its free memory: give kv_memory_mb, the memory "
            "of the KV cache"
        )
    return stats["bytes_limit"] - stats["bytes_in_use"]


def pool_shapes(
    layers: Mapping[KVShape, int], budget: int, config: EngineConfig, placement: Placement
) -> dict[KVShape, PoolShape]:
    """A pool for each KV shape. Together they take `budget` bytes on all devices, shared out so that the
    deepest chain of each shape has room for as many tokens; none is larger than max_num_seqs sequences can
    fill.

    Args:
      layers: of each shape, how many attention layers the deepest chain has.
      budget: bytes of all pools, their null pages apart.
      config: of the agent.
      placement: the devices.

    Raises:
      ValueError: a pool does not hold one sequence of the longest length where the memory was given, or
        not one page of each layer.
    """
    empty = {shape: _empty_pool(shape, config, placement) for shape in layers}
    token_page = {shape: layers[shape] * pool.page_bytes for shape, pool in empty.items()}
    total = sum(token_page.values())
    return {
        shape: dataclasses.replace(
            pool, num_pages=1 + _num_pages(budget, layers[shape], total, config)
        )
        for shape, pool in empty.items()
    }


def _empty_pool(shape: KVShape, config: EngineConfig, placement: Placement) -> PoolShape:
    return PoolShape(
        num_pages=1,
        page_size=config.page_size,
        num_kv_heads=len(kv_heads(shape.num_kv_heads, config.sharding.ways("heads"))),
        head_dim=shape.head_dim,
        dtype=config.kv_dtype,
        backend=backend_of(placement.platform.name),
    )


def _num_pages(budget: int, layers: int, token_page: int, config: EngineConfig) -> int:
    """Pages of one pool; `token_page` is the bytes of one page in every layer of all pools."""
    each = budget // token_page
    if config.kv_memory_mb and each < config.max_pages:
        raise ValueError(
            f"kv_memory_mb {config.kv_memory_mb} does not hold one sequence of max_model_len "
            f"{config.max_model_len}: give at least {-(-config.max_pages * token_page // 10**6)}, "
            "or a smaller max_model_len"
        )
    if each < 1:
        raise ValueError(
            f"{max(budget, 0) // 10**6} MB of memory for the KV cache do not hold a page of "
            f"{token_page} bytes: serve fewer models, or free memory and start again"
        )
    most = layers * min(config.max_num_seqs * config.max_pages, config.kv_pages)
    least = layers * min(each, config.max_pages)
    return min(max(round_down(layers * each), least), most)


def round_down(pages: int) -> int:
    """The next lower rung of the ladder of pool sizes: 16 to 31 times a power of two. A little more or
    less of free memory then finds the programs of the last start, at most 6% of the memory unused."""
    shift = max(pages.bit_length() - 5, 0)
    return pages >> shift << shift


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
