"""What a soak asks of a server: good requests, bad ones, ones that leave or run out of time."""

import asyncio
import collections
import contextlib
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

from examples.demo_reference import Item, compare
from serving.client import AsyncClient
from serving.values import ClientError

_CONNECTIONS = 4
_STREAMS = 24
_SECONDS = 120.0
# Share of each kind; the rest are reference items, answered in full.
_SHARES = {"cancelled": 1 / 3, "expired": 0.08, "bad": 0.08, "sampled": 0.15}
_LONG = {"max_tokens": 200, "ignore_eos": True}
_BAD: Sequence[tuple[str, dict[str, Any]]] = (
    ("NOT_FOUND", {"model": "nobody"}),
    ("INVALID_ARGUMENT", {"prompt": []}),
    ("INVALID_ARGUMENT", {"prompt": ""}),
    ("INVALID_ARGUMENT", {"prompt": [5] * 5000}),
    ("INVALID_ARGUMENT", {"prompt": [10**6]}),
    ("INVALID_ARGUMENT", {"temperature": -1.0}),
    ("INVALID_ARGUMENT", {"max_tokens": 0}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One request and how it is to end; `fields` go to the client, `leave` says when it is given up:
    after so many messages, or after so many seconds."""

    kind: str
    item: Item
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: str = ""
    leave: int | float | None = None


def plan(items: Sequence[Item], count: int, seed: int) -> list[Job]:
    """`count` jobs over all the items' models, the same for the same seed."""
    rng = random.Random(seed)
    kinds = [kind for kind, share in _SHARES.items() for _ in range(round(share * count))]
    kinds += ["complete"] * (count - len(kinds))
    rng.shuffle(kinds)
    models = sorted({item.model for item in items})
    by_model = {m: [i for i in items if i.model == m] for m in models}
    jobs = []
    for number, kind in enumerate(kinds):
        item = rng.choice(by_model[models[number % len(models)]])
        if kind == "complete":
            prompt = item.prompt if rng.random() < 0.5 else item.prompt_ids
            fields, code, leave = {"prompt": prompt, "max_tokens": item.max_tokens}, "", None
        elif kind == "sampled":
            length = rng.choice((1, 15, 70, 150))
            fields = {
                "prompt": [rng.randrange(2, 300) for _ in range(length)],
                "temperature": rng.choice((0.5, 1.0)),
                "seed": rng.randrange(2**32),
                "logprobs": True,
                "max_tokens": rng.randrange(1, 40),
            }
            code, leave = "", None
        elif kind == "cancelled":
            fields, code = {"prompt": item.prompt, **_LONG}, ""
            leave = rng.choice((0, 1, rng.randrange(2, 8), rng.random() * 0.5))
        elif kind == "expired":
            fields, code, leave = {"prompt": item.prompt, **_LONG}, "DEADLINE_EXCEEDED", None
            fields["timeout"] = rng.uniform(0.001, 0.15)
        else:
            code, wrong = rng.choice(_BAD)
            fields, leave = {"prompt": item.prompt, **wrong}, None
        jobs.append(Job(kind=kind, item=item, fields=fields, code=code, leave=leave))
    return jobs


async def run(target: str, jobs: Sequence[Job], swaps: int) -> collections.Counter[str]:
    """Asks everything, many at a time, while models are loaded anew `swaps` times.

    Returns:
      How many ended as each kind; "wrong: ..." for those that did not end as they should.
    """
    ends: collections.Counter[str] = collections.Counter()
    work = iter(jobs)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(target, timeout=_SECONDS))
            for _ in range(_CONNECTIONS)
        ]

        async def stream(client: AsyncClient) -> None:
            for job in work:
                try:
                    ends[await ask(client, job)] += 1
                except ClientError as error:
                    ends[f"wrong: {job.kind} got {error}"] += 1

        async def swap(client: AsyncClient) -> None:
            models = sorted({job.item.model for job in jobs})
            for number in range(swaps):
                await asyncio.sleep(0.5)
                await client.load(models[number % len(models)])
                ends["swaps"] += 1

        async with asyncio.TaskGroup() as group:
            for number in range(_STREAMS):
                group.create_task(stream(clients[number % len(clients)]))
            group.create_task(swap(clients[0]))
    return ends


async def ask(client: AsyncClient, job: Job) -> str:
    """Asks one thing; how it ended.

    Raises:
      ClientError: with another status than the job's.
    """
    fields = {"model": job.item.model, **job.fields}
    stream = client.stream(fields.pop("model"), fields.pop("prompt"), **fields)
    chunks = []
    seconds = job.leave if isinstance(job.leave, float) else None
    try:
        async with contextlib.aclosing(stream), asyncio.timeout(seconds):
            if job.leave == 0:
                pending = asyncio.ensure_future(anext(stream))
                await asyncio.sleep(0)  # On its way, and not yet answered.
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
                return job.kind
            async for chunk in stream:
                chunks.append(chunk)
                if len(chunks) == job.leave:
                    return job.kind
    except TimeoutError:
        return job.kind
    except ClientError as error:
        if error.code == job.code:
            return job.kind
        raise
    return _judge(job, chunks)


def _judge(job: Job, chunks: list) -> str:
    """How an answer that came to its end compares with what was asked."""
    ids = [t for c in chunks for t in c.token_ids]
    last = chunks[-1]
    if last.usage is None or last.usage.completion_tokens != len(ids):
        return f"wrong: {job.kind} of {job.item.model} is not complete"
    if job.kind == "complete":
        verdict = compare(job.item, ids, last.finish_reason, "".join(c.text for c in chunks))
        if not verdict.same:
            return f"wrong: {job.item.model}: {verdict.reason}"
        return job.kind if verdict.position is None else "complete at a near tie"
    if job.kind == "sampled":
        logprobs = [p for c in chunks for p in c.logprobs]
        fits = len(ids) <= job.fields["max_tokens"] and len(logprobs) == len(ids)
        return job.kind if fits else f"wrong: {len(ids)} tokens, {len(logprobs)} logprobs"
    if job.kind == "cancelled":
        return "ended before it was cancelled"
    return f"wrong: {job.kind} was answered"
