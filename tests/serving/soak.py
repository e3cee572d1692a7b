"""`make soak`: half an hour of a server under more than it can do, while everything around it changes.

Twenty tenants send 1.2 times what the server can answer over TLS: requests that are answered in full, that
leave, that run out of time, that are wrong. Meanwhile models and adapters come and go, keys and certificates
are replaced, and in the middle of it engine and server are killed, drained and started again. It holds that
every request ends in one of completed, cancelled, refused with a reason; that greedy answers are those of
transformers; and that what a process holds once it is idle is what it held before.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import soak_load
from test_soak import children, resident
from test_tls import Authority

from examples import demo_reference, demo_server, demo_zoo
from serving.client import AsyncClient
from serving.client_tls import TLS
from serving.values import ClientError

TENANTS = 20
OVERLOAD = 1.2
# Requests that are open at once at most; more are a fault of ours.
MOST_OPEN = 400
MIB = 2**20
# What the memory of a process may grow by between two idle moments.
GROWTH = (0.05, 30 * MIB)
# A client waits so long for a server to come back.
RESUME_SECONDS = 240.0
REFUSALS = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}


def progress(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:6.0f} s] {text}", file=sys.stderr, flush=True)


BEGIN = time.monotonic()


class Tenants:
    """The tenants' file, and the keys that are good now."""

    def __init__(self, path: Path):
        self.path = path
        self.keys = [f"key-{number}-0" for number in range(TENANTS)]
        self._turn = 0
        self._next = self.keys
        self.write()

    def write(self) -> None:
        """Writes it aside and renames it; the next keys are good too."""
        entries = [{"name": "ops", "key_sha256": [_digest("ops")], "admin": True}]
        for number, key in enumerate(self.keys):
            keys = dict.fromkeys([key, self._next[number]])
            entries.append(
                {
                    "name": f"t{number:02}",
                    "key_sha256": [_digest(k) for k in keys],
                    "weight": 1.0 + number % 3,
                    "priority_ceiling": 0,
                    "max_requests": 24,
                }
            )
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps({"tenants": entries}))
        aside.chmod(0o600)
        os.replace(aside, self.path)

    def turn(self) -> None:
        """Makes new keys known; those of now stay good until the next turn."""
        self._turn += 1
        self._next = [f"key-{n}-{self._turn}" for n in range(TENANTS)]
        self.write()

    def adopt(self) -> None:
        """The new keys are used from now on."""
        self.keys = self._next


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Server:
    """`jblock-serve` at one address, started as often as it takes."""

    def __init__(self, folder: Path, models: Sequence[str], authority: Authority):
        self.folder, self.models, self.authority = folder, models, authority
        self.port, self.metrics_port = _free_port(), _free_port()
        self.process: subprocess.Popen | None = None
        self.starts = 0
        self.sign()

    def sign(self) -> None:
        """A new certificate of the same authority."""
        tls = self.authority.sign("fresh", "DNS:localhost,IP:127.0.0.1")
        for source, name in ((tls.key_file, "server.key"), (tls.cert_file, "server.pem")):
            aside = self.folder / f"{name}.new"
            aside.write_bytes(Path(source).read_bytes())
            aside.chmod(0o600)
            os.replace(aside, self.folder / name)

    async def start(self) -> None:
        """Starts it and waits until it serves."""
        self.starts += 1
        log = self.folder / f"server-{self.starts}.log"
        flags = {
            "port": self.port,
            "metrics_port": self.metrics_port,
            "drain_seconds": 5,
            "auth_file": self.folder / "tenants.json",
            "tls_cert_file": self.folder / "server.pem",
            "tls_key_file": self.folder / "server.key",
            "executable_cache": self.folder / "programs",
            "request_log": self.folder / "requests.jsonl",
            "max_queue": 64,
            "adapter_slots": 2,
        }
        command = demo_server.command(
            self.folder / "zoo", self.models, *(f"--{n}={v}" for n, v in flags.items())
        )
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while "jblock: serving" not in log.read_text(errors="replace"):
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text()[-2000:]}")
            await asyncio.sleep(0.2)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def end(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the end; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 60)

    def figures(self) -> dict[str, float]:
        """Numbers of now: of its metrics, and of its processes as the kernel has them."""
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        url = f"https://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30, context=context) as page:
            lines = page.read().decode().splitlines()
        found = {
            name.removeprefix("jblock_"): float(value)
            for name, value in (x.rsplit(" ", 1) for x in lines if x[:1] not in ("#", ""))
            if "{" not in name
        }
        for name, pid in zip(("server", "engine"), (self.pid, *children(self.pid)), strict=False):
            found[f"{name}_bytes"] = resident(pid)
            found[f"{name}_threads"] = len(os.listdir(f"/proc/{pid}/task"))
            found[f"{name}_files"] = len(os.listdir(f"/proc/{pid}/fd"))
        return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@dataclasses.dataclass
class Soak:
    """The run, and what came of it."""

    server: Server
    tenants: Tenants
    items: Sequence[demo_reference.Item]
    churned: Sequence[str]
    rng: random.Random
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    changes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = dataclasses.field(default_factory=list)
    open: int = 0
    rate: float = 0.0

    def client(self, number: int) -> AsyncClient:
        """A connection of a tenant."""
        return self._client(self.tenants.keys[number])

    def _client(self, key: str) -> AsyncClient:
        tls = TLS(ca_file=str(self.server.authority.cert))
        where = f"127.0.0.1:{self.server.port}"
        return AsyncClient(where, timeout=600.0, key=key, tls=tls, resume_seconds=RESUME_SECONDS)

    def jobs(self, seed: int, count: int = 400) -> list[soak_load.Job]:
        return soak_load.plan(self.items, count, seed)

    async def ask(self, client: AsyncClient, job: soak_load.Job) -> str:
        """Asks one thing; how it ended."""
        try:
            end = await soak_load.ask(client, job)
        except ClientError as error:
            end = self._refusal(job, error)
        self.ends[end] += 1
        if end.startswith("wrong"):
            self.faults.append(end)
            progress(end)
        return end

    def _refusal(self, job: soak_load.Job, error: ClientError) -> str:
        word = error.message.partition(":")[0]
        if error.code in REFUSALS and error.by_server:
            return f"refused: {word}"
        if error.code == "DEADLINE_EXCEEDED" and job.kind == "cancelled":
            return "refused: deadline"
        if error.code == "NOT_FOUND" and job.item.model in self.churned:
            return "refused: model"
        return f"wrong: {job.kind} of {job.item.model} got {error}"

    async def capacity(self, seconds: float) -> float:
        """Requests a second of as many streams as the server likes."""
        jobs, count = iter(self.jobs(seed=0, count=4000)), 0
        end = time.monotonic() + seconds

        async def stream(number: int) -> None:
            nonlocal count
            async with self.client(number) as client:
                await self._met(client)
                while time.monotonic() < end:
                    await self.ask(client, next(jobs))
                    count += 1

        begin = time.monotonic()
        await asyncio.gather(*(stream(number) for number in range(16)))
        return count / (time.monotonic() - begin)

    async def load(self, over: asyncio.Event) -> None:
        """Sends requests at `rate` whatever becomes of them, until it is over; then waits for the last."""
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            clients: dict[str, AsyncClient] = {}
            for seed in range(10**9):
                for job in self.jobs(seed + 1):
                    await asyncio.sleep(self.rng.expovariate(self.rate))
                    if over.is_set():
                        return
                    if self.open >= MOST_OPEN:  # While no server is there all wait.
                        self.changes["not sent"] += 1
                        continue
                    key = self.rng.choice(self.tenants.keys)
                    if key not in clients:
                        clients[key] = await stack.enter_async_context(self._client(key))
                        await self._met(clients[key])
                    group.create_task(self._counted(clients[key], job))

    async def _met(self, client: AsyncClient) -> None:
        """Waits until the server has answered a client: one that it never met waits for nobody."""
        for _ in range(int(RESUME_SECONDS)):
            try:
                await client.models()
                return
            except ClientError:
                await asyncio.sleep(1.0)
        raise RuntimeError("the server did not come back")

    async def _counted(self, client: AsyncClient, job: soak_load.Job) -> None:
        self.open += 1
        try:
            await self.ask(client, job)
        finally:
            self.open -= 1

    async def change(self, kind: str) -> None:
        """One thing that happens to a server."""
        server = self.server
        if kind == "models":
            async with self._client("ops") as client:
                name = self.rng.choice(self.churned)
                with contextlib.suppress(ClientError):  # It is not there, or not any more.
                    await client.unload(name)
                await client.load(name)
        elif kind == "keys":
            self.tenants.turn()
            await asyncio.sleep(5.0)  # The file is looked at every second or two.
            self.tenants.adopt()
        elif kind == "certificate":
            server.sign()
            await asyncio.sleep(3.0)
        elif kind == "engine killed":
            os.kill(self.rng.choice(children(server.pid)), signal.SIGKILL)
        elif kind == "server killed":
            await server.end(signal.SIGKILL)
            await server.start()
        else:
            code = await server.end(signal.SIGTERM)
            if code:
                self.faults.append(f"a drain ended with {code}")
            await server.start()
        self.changes[kind] += 1
        progress(f"{kind}; {self.open} open, {dict(self.ends)}")

    async def phase(self, seconds: float, kinds: Sequence[str], every: float) -> None:
        """Load and changes for a while."""
        over = asyncio.Event()
        load = asyncio.create_task(self.load(over))
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end and not load.done():
            await self.change(kinds[number % len(kinds)])
            number += 1
            rest = time.monotonic() + every
            while time.monotonic() < min(rest, end):
                await asyncio.sleep(1.0)
                with contextlib.suppress(OSError):
                    figures = await asyncio.to_thread(self.server.figures)
                    self.samples.append((time.monotonic() - BEGIN, figures))
        over.set()
        await load

    async def idle(self) -> dict[str, float]:
        """What the server holds once nothing runs and nothing is compiled."""
        compiled, since = -1.0, time.monotonic()
        while time.monotonic() - since < 12.0:
            await asyncio.sleep(1.0)
            found = await asyncio.to_thread(self.server.figures)
            busy = found["running"] + found["waiting"] + found["requests_open"]
            if found["compiles_in_background_total"] != compiled or busy:
                compiled, since = found["compiles_in_background_total"], time.monotonic()
        if found["pages_free"] != found["pages_total"] or found["rows_free"] != found["rows_total"]:
            self.faults.append(f"not all pages and rows came back: {found}")
        return found

    def flat(self, before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
        """Growth between two idle moments of the same processes; what is too much is a fault."""
        grown = {}
        for of in ("server", "engine"):
            for what in ("bytes", "threads", "files"):
                name = f"{of}_{what}"
                grown[name] = after[name] - before[name]
                most = max(GROWTH[0] * before[name], GROWTH[1]) if what == "bytes" else 8
                if grown[name] > most:
                    self.faults.append(f"{name} grew from {before[name]} to {after[name]}")
        return grown

    def slopes(self, since: float) -> dict[str, float]:
        """Change an hour of what was sampled since, by least squares."""
        found = {}
        samples = [(at, figures) for at, figures in self.samples if at >= since]
        for name in (
            "pages_free",
            "rows_free",
            *(f"{o}_{w}" for o in ("server", "engine") for w in ("bytes", "threads", "files")),
        ):
            points = [(at, figures[name]) for at, figures in samples if name in figures]
            if len(points) > 2:
                mean_t = sum(t for t, _ in points) / len(points)
                mean = sum(v for _, v in points) / len(points)
                spread = sum((t - mean_t) ** 2 for t, _ in points)
                slope = sum((t - mean_t) * (v - mean) for t, v in points) / spread
                found[name] = round(slope * 3600, 2)
        return found


async def soak(run: Soak, minutes: float) -> dict[str, Any]:
    """The whole of it: calm changes, then kills and drains, then calm again."""
    seconds = 60.0 * minutes
    calm = ("models", "keys", "certificate")
    await run.server.start()
    await run.idle()
    run.rate = OVERLOAD * await run.capacity(min(60.0, seconds / 10))
    progress(f"{run.rate / OVERLOAD:.1f} requests a second is what it can do")
    await run.phase(0.1 * seconds, calm, every=5.0)  # All that is compiled once and cached.
    before, since = await run.idle(), time.monotonic() - BEGIN
    await run.phase(0.35 * seconds, calm, every=10.0)
    slopes = run.slopes(since)
    after = await run.idle()
    grown = run.flat(before, after)
    every = max(10.0, seconds / 60)
    await run.phase(0.3 * seconds, ("engine killed", "server killed", "drained", *calm), every)
    await run.idle()
    await run.phase(0.1 * seconds, calm, every=10.0)
    last = await run.idle()
    if last["compiles_on_serving_path_total"]:
        run.faults.append("programs were compiled while requests waited")
    if code := await run.server.end(signal.SIGTERM):
        run.faults.append(f"the server ended with {code}")
    logged = sum(1 for _ in (run.server.folder / "requests.jsonl").open())
    return {
        "soak": {
            "minutes": minutes,
            "faults": len(run.faults),
            "requests": sum(run.ends.values()),
            "ends": dict(run.ends),
            "changes": dict(run.changes),
            "grown_while_calm": grown,
            "slopes_an_hour": slopes,
            "logged": logged,
        },
        "faults": run.faults[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    items = demo_reference.load(demo_zoo.ROOT / "reference.json")
    names = sorted({item.model for item in items})
    family = demo_zoo.load_family(names)
    churned = [*[n for n, e in family.items() if e["kind"] == "lora"][:3], names[-1]]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        demo_zoo.convert(demo_zoo.with_bases(family), folder / "zoo")
        (folder / "ca").mkdir()
        server = Server(folder, names, Authority(folder / "ca"))
        tenants = Tenants(folder / "tenants.json")
        run = Soak(server, tenants, items, churned, random.Random(args.seed))
        try:
            result = asyncio.run(soak(run, args.minutes))
        finally:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
                server.process.wait()
            for log in sorted(folder.glob("server-*.log")):
                if "Traceback" in log.read_text(errors="replace"):
                    run.faults.append(f"{log.name} has a traceback")
                    progress(log.read_text(errors="replace")[-4000:])
    print(json.dumps(result))
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
