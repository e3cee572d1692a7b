"""What happens in a soak: load, changes around it, and idle moments that are compared."""

import asyncio
import collections
import contextlib
import gc
import os
import random
import signal
import sys
import time
from collections.abc import Sequence

import soak_load
from soak_server import RELOAD_SECONDS, Server, SoakError, Tenants, until

from examples import demo_reference
from serving.client import AsyncClient
from serving.client_tls import TLS
from serving.values import ClientError

CALM = ("models", "keys", "certificate")
# Streams that find out what the server can do.
STREAMS = 16
# Requests that are open at once at most; while no server is there all wait, and more are not sent.
MOST_OPEN = 400
# A client waits so long for a server to come back, and for an answer.
RESUME_SECONDS, ANSWER_SECONDS = 200.0, 240.0
# What was sent ends so long after the load at most, and a model is loaded within so long.
SETTLE_SECONDS, LOAD_SECONDS = 90.0, 60.0
# No phase is shorter.
SHORTEST_PHASE = 8.0
# What compiles in the background is waited for, and nothing may have been compiled for so long then.
COMPILE_SECONDS, QUIET_SECONDS = 60.0, 6.0
# What the memory of a process may grow by between two idle moments, and its threads and descriptors.
MIB = 2**20
GROWTH, MORE = (0.05, 30 * MIB), 8
HELD = tuple(
    f"{of}_{what}" for of in ("server", "engine") for what in ("bytes", "threads", "files")
)
REFUSALS = {"UNAVAILABLE", "RESOURCE_EXHAUSTED"}
_BEGIN = time.monotonic()


class Soak:
    """The run, and what came of it.

    Attributes:
      server: that is soaked.
      rate: requests a second that are sent.
      sent: requests so far.
      ends: how they ended: a kind of `soak_load.Job`, or "refused: " and a reason. Any other is a fault.
      changes: what happened to the server, by kind.
      faults: what should not have been.
      idles: figures at idle moments of the calm, each with its time.
      grown: between the first and the last of them.
      quiet_answers: greedy answers of the quiet server that are those of transformers.
      doing: in words, for faults.
    """

    def __init__(
        self,
        server: Server,
        tenants: Tenants,
        items: Sequence[demo_reference.Item],
        churned: Sequence[str],
        rng: random.Random,
    ):
        """`items` are asked; models that are `churned` come and go."""
        self.server, self._tenants, self._items = server, tenants, items
        self._churned, self._rng = churned, rng
        self.rate, self.sent, self.quiet_answers = 0.0, 0, 0
        self.ends: collections.Counter[str] = collections.Counter()
        self.changes: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.idles: list[tuple[float, dict[str, float]]] = []
        self.grown: dict[str, float] = {}
        self.doing = "starting"
        self._open: set[asyncio.Task] = set()
        self._kills = 0
        self._oldest: str | None = None  # A key that is in the file no more after the next turn.

    def fault(self, text: str) -> None:
        """Notes what should not have been."""
        self.faults.append(text)
        self._say(f"FAULT: {text}")

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - _BEGIN:6.0f} s] {text}", file=sys.stderr, flush=True)

    def _step(self, text: str) -> None:
        self.doing = text
        self._say(text)

    def _client(self, key: str) -> AsyncClient:
        tls = TLS(ca_file=str(self.server.authority.cert))
        where = f"127.0.0.1:{self.server.port}"
        return AsyncClient(
            where, timeout=ANSWER_SECONDS, key=key, tls=tls, resume_seconds=RESUME_SECONDS
        )

    async def quiet(self, per_model: int) -> None:
        """Asks items of each model one at a time. Those whose answers are transformers' to the last token are
        asked under load: then an answer like transformers' is one like the quiet server's."""
        self._step("the quiet run")
        models = sorted({item.model for item in self._items})
        wanted = [i for m in models for i in [x for x in self._items if x.model == m][:per_model]]
        same = []
        async with self._client(self._tenants.keys[0]) as client:
            for item in wanted:
                fields = {"prompt": item.prompt, "max_tokens": item.max_tokens}
                job = soak_load.Job(kind="complete", item=item, fields=fields)
                end = await soak_load.ask(client, job)
                if end == "complete":
                    same.append(item)
                elif end.startswith("wrong"):
                    self.fault(f"the quiet run: {end}")
        self._items, self.quiet_answers = same, len(same)
        if not same:
            raise SoakError("no answer of the quiet run is that of transformers")

    def _jobs(self, seed: int, count: int = 400) -> list[soak_load.Job]:
        return soak_load.plan(self._items, count, seed)

    async def _ask(self, client: AsyncClient, job: soak_load.Job) -> None:
        """Asks one thing, and notes how it ended."""
        try:
            end = await soak_load.ask(client, job)
            if end in ("expired", "bad"):
                end = f"refused: {job.code}"
        except ClientError as error:
            end = self._refusal(job, error)
        except Exception as error:
            end = f"wrong: {job.kind} of {job.item.model} ended with {error!r}"
        self.ends[end] += 1
        if end.startswith("wrong"):
            self.fault(end)

    def _refusal(self, job: soak_load.Job, error: ClientError) -> str:
        word = error.message.partition(":")[0]
        if error.code in REFUSALS and error.by_server:
            return f"refused: {word}"
        if error.code == "DEADLINE_EXCEEDED" and job.kind == "cancelled":
            return f"refused: {error.code}"
        if error.code == "NOT_FOUND" and job.item.model in self._churned:
            return "refused: model"
        return f"wrong: {job.kind} of {job.item.model} got {error}"

    async def capacity(self, end: float) -> float:
        """Requests a second of as many streams as the server likes, until a time."""
        self._step("what the server can do")
        jobs, count = iter(self._jobs(seed=0, count=20_000)), 0

        async def stream(key: str) -> None:
            nonlocal count
            async with self._client(key) as client:
                while time.monotonic() < end:
                    self.sent += 1
                    await self._ask(client, next(jobs))
                    count += 1

        begin = time.monotonic()
        await asyncio.gather(*(stream(key) for key in self._tenants.keys[:STREAMS]))
        found = max(count, 1) / (time.monotonic() - begin)
        self._say(f"{found:.1f} requests a second")
        return found

    async def phase(self, end: float, kinds: Sequence[str], least: int = 0) -> None:
        """Load and changes until a time; at least so many changes."""
        begin = time.monotonic()
        end = max(end, begin + SHORTEST_PHASE)
        every = max(1.0, min(10.0, (end - begin) / (len(kinds) + 1)))
        self._step(f"load with {', '.join(kinds)}")
        load = asyncio.create_task(self._load())
        number = 0
        try:
            while number < least or time.monotonic() + every < end:
                await self._change(kinds[number % len(kinds)])
                number += 1
                await asyncio.sleep(every)
            await asyncio.sleep(max(0.0, end - time.monotonic()))
        finally:
            load.cancel()
            (end_of_load,) = await asyncio.gather(load, return_exceptions=True)
            if not isinstance(end_of_load, asyncio.CancelledError):
                self.fault(f"the load ended with {end_of_load!r}")

    async def _load(self) -> None:
        """Sends requests at `rate` whatever becomes of them, until it is cancelled; then waits for the last
        of them, for a while."""
        clients: dict[str, asyncio.Task[AsyncClient]] = {}
        try:
            for seed in range(10**9):
                for job in self._jobs(seed + 1):
                    await asyncio.sleep(self._rng.expovariate(self.rate))
                    if len(self._open) >= MOST_OPEN:
                        self.changes["requests not sent, for too many were open"] += 1
                        continue
                    key = self._rng.choice(self._tenants.keys)
                    if key not in clients:
                        clients[key] = asyncio.create_task(self._met(key))
                    self.sent += 1
                    task = asyncio.create_task(self._sent(clients[key], job))
                    self._open.add(task)
                    task.add_done_callback(self._open.discard)
        finally:
            await self._settle()
            for made in clients.values():
                made.cancel()
            found = await asyncio.gather(*clients.values(), return_exceptions=True)
            for client in found:
                if isinstance(client, AsyncClient):
                    await client.close()

    async def _settle(self) -> None:
        """Waits for what was sent."""
        if not self._open:
            return
        _, left = await asyncio.wait(self._open, timeout=SETTLE_SECONDS)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
            self.ends["wrong: not over"] += len(left)
            self.fault(f"{len(left)} requests were not over {SETTLE_SECONDS:g} s after the load")

    async def _met(self, key: str) -> AsyncClient:
        """A client that the server has answered: one that it never met waits for nobody."""
        client = self._client(key)
        end = time.monotonic() + RESUME_SECONDS
        while True:
            try:
                await client.models()
                return client
            except ClientError as error:
                if error.code != "UNAVAILABLE" or time.monotonic() > end:
                    self.fault(f"a new client got {error}")
                    return client
                await asyncio.sleep(1.0)

    async def _sent(self, made: asyncio.Task[AsyncClient], job: soak_load.Job) -> None:
        await self._ask(await asyncio.shield(made), job)

    async def _change(self, kind: str) -> None:
        """One thing that happens to a server."""
        server = self.server
        if kind == "models":
            kind = await self._change_models()
        elif kind == "keys":
            await self._change_keys()
        elif kind == "certificate":
            server.sign()
            what = "the new certificate is shown"
            await until(what, RELOAD_SECONDS, server.shows_its_certificate)
        elif kind == "engine killed":
            await until(
                "an engine to kill", RELOAD_SECONDS, lambda: server.engine_pid() is not None
            )
            if pid := server.engine_pid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._kills += 1
        elif kind == "server killed":
            await server.end(signal.SIGKILL)
            await server.start()
        else:
            if code := await server.end(signal.SIGTERM):
                self.fault(f"a drain ended with {code}")
            await server.start()
        self.changes[kind] += 1
        self._say(f"{kind}; {len(self._open)} open, {dict(self.ends)}")

    async def _change_models(self) -> str:
        """Takes a model away and brings it back; what came of it."""
        async with self._client("ops") as client:
            name = self._rng.choice(self._churned)
            with contextlib.suppress(ClientError):  # It is not there, or not any more.
                await client.unload(name)
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    await client.load(name)
            except TimeoutError:
                return "models, loading took too long"  # Much is compiled, on a busy machine.
            except ClientError as error:
                if not (self._kills and error.code == "UNAVAILABLE"):
                    self.fault(f"loading {name} got {error}")
                return "models, the load was refused"
        return "models"

    async def _change_keys(self) -> None:
        """Turns the keys: the new ones are good once the file was read, and those before the ones of now are
        not any more."""
        before, new = self._tenants.keys[0], self._tenants.turn()
        end = time.monotonic() + RELOAD_SECONDS
        async with self._client(new[0]) as client:
            while True:
                try:
                    await client.models()
                    break
                except ClientError as error:
                    if time.monotonic() > end:
                        raise SoakError(f"the new keys are not taken: {error}") from error
                    await asyncio.sleep(0.5)
        if self._oldest is not None:
            async with self._client(self._oldest) as client:
                with contextlib.suppress(ClientError):
                    await client.models()
                    self.fault("a key that is no more in the file was taken")
        self._oldest = before
        self._tenants.adopt()

    async def idle(self, when: str) -> None:
        """Waits until nothing runs, and nothing is compiled; then all pages and rows must be back. In the
        calm the moment is kept."""
        self._step(f"idle {when}")
        gc.collect()  # grpc keeps connections of ours that were closed until then.
        begin = since = time.monotonic()
        compiled, found = -1.0, {}
        while (
            time.monotonic() - since < QUIET_SECONDS and time.monotonic() - begin < COMPILE_SECONDS
        ):
            await asyncio.sleep(1.0)
            with contextlib.suppress(OSError):
                found = await asyncio.to_thread(self.server.figures)
                busy = found["running"] + found["waiting"] + found["requests_open"]
                busy += not found["engine_up"]
                if found["compiles_in_background_total"] != compiled or busy:
                    compiled, since = found["compiles_in_background_total"], time.monotonic()
        if not found.keys() >= set(HELD):
            raise SoakError("the server has no engine, or its metrics do not answer")
        if found["running"] + found["waiting"] + found["requests_open"]:
            self.fault(f"idle {when}: requests are open, and nobody asks: {found}")
        for what in ("pages", "rows"):
            free, total = found[f"{what}_free"], found[f"{what}_total"]
            if free != total:
                self.fault(f"idle {when}: {free:g} of {total:g} {what} are free")
        if found["compiles_on_serving_path_total"]:
            self.fault(f"idle {when}: programs were compiled while requests waited")
        if "calm" in when:
            self.idles.append((time.monotonic(), found))

    def judge_growth(self) -> None:
        """Compares the first and the last idle moment of the calm. What is compiled takes memory."""
        (_, before), (_, after) = self.idles[0], self.idles[-1]
        compiled = "compiles_in_background_total"
        self.grown["programs"] = after[compiled] - before[compiled]
        for name in HELD:
            self.grown[name] = grown = after[name] - before[name]
            of_bytes = name.endswith("bytes")
            most = max(GROWTH[0] * before[name], GROWTH[1]) if of_bytes else MORE
            if grown > most and not (of_bytes and self.grown["programs"]):
                self.fault(f"{name} grew from {before[name]:g} to {after[name]:g}")

    def slopes(self) -> dict[str, float]:
        """Change an hour over the idle moments of the calm, by least squares."""
        found = {}
        if len(self.idles) < 2:
            return found
        times = [at for at, _ in self.idles]
        mean_t = sum(times) / len(times)
        spread = sum((t - mean_t) ** 2 for t in times)
        for name in ("pages_free", "rows_free", *HELD):
            values = [figures[name] for _, figures in self.idles]
            mean = sum(values) / len(values)
            slope = sum((t - mean_t) * (v - mean) for t, v in zip(times, values, strict=True))
            found[name] = round(slope / spread * 3600, 2)
        return found

    async def end(self) -> None:
        """Ends the server as an operator does."""
        self._step("ending the server")
        if code := await self.server.end(signal.SIGTERM):
            self.fault(f"the server ended with {code}")
