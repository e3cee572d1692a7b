"""`jblock doctor`: is all there that jblock needs? Environment, device, zoo, cache and ports, a line each.

What is wrong makes the exit code 1 and says what to do; what is only missed by some uses is noted.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from jblock.command import program, version

_PYTHON, _JAX = (3, 11), (0, 10, 2)
_EXTRAS = {
    "llvmlite": "cpu: machine code of our own; without it attention on CPU takes three times as long",
    "optax": "train: trains the demo family again",
    "matplotlib": "plot: figures of the benchmarks",
}
_DEVICE_SECONDS = 120
# jax takes a device when it looks for one, so a child looks, and gives it back.
_DEVICES = "import jax; d = jax.devices(); print(d[0].platform, len(d), d[0].device_kind, sep='|')"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      about: "environment", "device", "zoo", "cache" or "ports".
      state: "ok", "note" or "wrong".
      text: what was found, and what to do where it is wrong.
    """

    about: str
    state: str
    text: str


def environment() -> Iterator[Finding]:
    """Python, jax and the extras."""
    right = sys.version_info >= _PYTHON
    yield Finding(
        "environment",
        "ok" if right else "wrong",
        version() if right else f"Python {platform.python_version()}: 3.11 or newer is needed",
    )
    numbers = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    if tuple(int(n) for n in re.findall(r"\d+", numbers["jax"])[:3]) < _JAX:
        yield Finding(
            "environment",
            "wrong",
            f"jax {numbers['jax']}: {'.'.join(map(str, _JAX))} or newer is needed",
        )
    if numbers["jax"] != numbers["jaxlib"]:
        yield Finding(
            "environment",
            "wrong",
            f"jax {numbers['jax']} and jaxlib {numbers['jaxlib']} differ: install both again",
        )
    for name, use in _EXTRAS.items():
        if importlib.util.find_spec(name) is None:
            yield Finding("environment", "note", f"{name} is not installed (extra {use})")


def device() -> Iterator[Finding]:
    """What jax computes on."""
    try:
        found = subprocess.run(
            [sys.executable, "-c", _DEVICES],
            capture_output=True,
            text=True,
            timeout=_DEVICE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "device",
            "wrong",
            f"jax found no device in {_DEVICE_SECONDS} s: another process may hold it; JAX_PLATFORMS=cpu "
            "computes on the CPU",
        )
        return
    if found.returncode:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "device",
            "wrong",
            f"jax finds no device ({last}): JAX_PLATFORMS=cpu computes on the CPU",
        )
        return
    backend, count, kind = found.stdout.strip().splitlines()[-1].split("|")
    yield Finding("device", "ok", f"{count} x {kind} ({backend})")
    if backend == "cpu":
        yield Finding("device", "ok", f"{os.cpu_count()} CPUs, {_memory_gib():.1f} GiB of memory")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def zoo(path: Path) -> Iterator[Finding]:
    """Whether the zoo can be read, and what it holds."""
    from jblock.zoo.listing import list_models
    from jblock.zoo.records import ZooError
    from jblock.zoo.store import Zoo

    try:
        totals = list_models(Zoo.open(path))["totals"]
    except (ZooError, OSError) as e:
        yield Finding("zoo", "wrong", str(e))
        return
    yield Finding(
        "zoo",
        "ok",
        f"{path}: {totals['chains']} models, {totals['components']} components, "
        f"{_gib(totals['stored_bytes'])}; 'jblock convert fsck' checks every byte",
    )
    if not os.access(path, os.W_OK):
        yield Finding(
            "zoo", "note", f"{path} cannot be written by this user: it can be served only"
        )
    yield from _space("zoo", path)


def cache() -> Iterator[Finding]:
    """The folder of compiled programs and training state."""
    from jblock.user_cache import UserCacheError, private_folder

    try:
        folder = private_folder()
    except UserCacheError as e:
        yield Finding("cache", "wrong", str(e))
        return
    nbytes = sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file())
    yield Finding("cache", "ok", f"{folder}: {_gib(nbytes)}, written by this user only")
    yield from _space("cache", folder)


def ports(host: str, numbers: list[int]) -> Iterator[Finding]:
    """Whether a server could listen."""
    for number in numbers:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, number))
                yield Finding("ports", "ok", f"{host}:{number} is free")
            except OSError as e:
                yield Finding(
                    "ports",
                    "wrong",
                    f"{host}:{number}: {e.strerror}: stop what listens there ('jblock client health' asks "
                    "whether it is a server of jblock), or serve with --port",
                )


def _space(about: str, path: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(path).free
    if free < 2**30:
        yield Finding(about, "wrong", f"only {_gib(free)} are free on the disk of {path}")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def parser(name: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(prog=name, description=__doc__)
    made.add_argument("--zoo", type=Path, help="also look at this zoo")
    made.add_argument("--host", default="127.0.0.1", help="address a server would listen on")
    made.add_argument(
        "--port", type=int, action="append", help="port it would listen on (default: 8470)"
    )
    made.add_argument("--json", action="store_true", help="print the findings as JSON")
    return made


def examine(args: argparse.Namespace) -> list[Finding]:
    """All findings."""
    looks: list[Callable[[], Iterator[Finding]]] = [environment, device]
    if args.zoo is not None:
        looks.append(lambda: zoo(args.zoo))
    looks += [cache, lambda: ports(args.host, args.port or [8470])]
    return [finding for look in looks for finding in look()]


def run() -> None:
    """Entry point of `jblock doctor`."""
    args = parser(program(sys.argv[0], "jblock doctor")).parse_args(sys.argv[1:])
    findings = examine(args)
    wrong = sum(f.state == "wrong" for f in findings)
    if args.json:
        rows = [dataclasses.asdict(f) for f in findings]
        print(json.dumps({"wrong": wrong, "findings": rows}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<5} {finding.about:<12} {finding.text}")
        print(f"{wrong} things are wrong" if wrong else "all is well")
    sys.exit(1 if wrong else 0)
