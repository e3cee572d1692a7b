"""Streams over gRPC and HTTP, read as raw bytes, with the time of each."""

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import grpc

from serving.v1 import jblock_pb2 as pb

TOKEN_CHARACTERS = 5
_METHOD = "/jblock.v1.Inference/GenerateStream"
# Asks one thing: a prompt and how many tokens; yields how many tokens each message brought.
Ask = Callable[[Sequence[int], int], AsyncIterator[int]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What some streams at once brought.

    Attributes:
      tokens_per_second: of all, from the first request to the last token.
      first_token_s: from each request to its first bytes.
      cpu_us: CPU microseconds of the server for each token after the first ones.
    """

    tokens_per_second: float
    first_token_s: tuple[float, ...]
    cpu_us: float


def over_grpc(channel: grpc.aio.Channel) -> Ask:
    """Asks GenerateStream."""
    call = channel.unary_stream(_METHOD)

    async def ask(prompt: Sequence[int], count: int) -> AsyncIterator[int]:
        request = pb.GenerateRequest(
            model="base", max_tokens=count, ignore_eos=True, token_ids=pb.TokenIds(ids=prompt)
        )
        async for message in call(request.SerializeToString()):
            yield len(pb.GenerateStreamResponse.FromString(message).token_ids)

    return ask


def over_http(port: int) -> Ask:
    """Asks /v1/completions. Tokens are told by their text: each is a word of TOKEN_CHARACTERS."""

    async def ask(prompt: Sequence[int], count: int) -> AsyncIterator[int]:
        body = json.dumps(
            {
                "model": "base",
                "prompt": list(prompt),
                "max_tokens": count,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        # The bare server reads the number of tokens from the query.
        head = (
            f"POST /v1/completions?{count} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        )
        writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
        try:
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    text = json.loads(line[6:])["choices"][0]["text"]
                    yield len(text) // TOKEN_CHARACTERS
        finally:
            writer.close()

    return ask


async def measure(ask: Ask, prompts: Sequence[Sequence[int]], count: int, pid: int) -> Measured:
    """Asks all at once.

    Args:
      ask: over one protocol.
      prompts: one a stream.
      count: tokens of each.
      pid: of the server.
    """
    begin = time.perf_counter()
    firsts: list[float] = []
    done, before, cpu = 0, 0, 0

    async def one(prompt: Sequence[int]) -> None:
        nonlocal done, before, cpu
        got = 0
        async for tokens in ask(prompt, count):
            if not got:
                firsts.append(time.perf_counter() - begin)
                if len(firsts) == len(prompts):
                    before, cpu = done, cpu_ns(pid)
            got += tokens
            done += tokens
        if got != count:
            raise RuntimeError(f"a stream brought {got} tokens of {count}")

    await asyncio.gather(*(one(prompt) for prompt in prompts))
    seconds = time.perf_counter() - begin
    total = len(prompts) * count
    return Measured(
        tokens_per_second=total / seconds,
        first_token_s=tuple(firsts),
        cpu_us=(cpu_ns(pid) - cpu) / 1e3 / (total - before),
    )


async def first_bytes(ask: Ask, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Seconds to the first token of each, asked one after the other."""
    times = []
    for prompt in prompts:
        begin = time.perf_counter()
        async for _ in ask(prompt, 2):
            times.append(time.perf_counter() - begin)
            break
        await asyncio.sleep(0.05)  # Until it is cancelled.
    return times


def cpu_ns(pid: int) -> int:
    """Nanoseconds that the threads of a process have run."""
    folder = Path(f"/proc/{pid}/task")
    return sum(int((folder / t / "schedstat").read_text().split()[0]) for t in os.listdir(folder))
