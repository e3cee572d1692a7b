"""What answers that keep to a schema cost, and what schemas that explode do to others."""

import argparse
import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.front.process import compiled_in_background, serve, settle
from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape, save
from bench.report import median, percentile, progress, spread
from serving.client import AsyncClient
from serving.values import ClientError

_STREAMS = 16
_PROMPT = 16
# Longer than any answer here.
_SCHEMA = {
    "type": "array",
    "minItems": 100,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 4, "maxLength": 24},
            "kind": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 100_000},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "kind", "count", "tags"],
        "additionalProperties": False,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--rounds", type=int, default=5, help="of each way, in turns")
    parser.add_argument("--tokens", type=int, default=96, help="of each of the 16 streams")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`constrained_over_free`: tokens/s of streams that keep to a schema over those of free ones.
    `p95_ratio`: p95 of what free streams wait for their next message beside exploding schemas, over that
    without.
    `refused_s`: the longest until one of those was refused; `exploding_refused`: how many were."""
    shape = TINY if args.quick else MODEL_250M
    rounds, tokens = (1, 24) if args.quick else (args.rounds, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "zoo": str(_zoo(Path(folder), shape)),
            "executable_cache": str(args.cache),
            "max_num_seqs": _STREAMS,
            "max_model_len": 512,
            "kv_memory_mb": 600,
        }
        with serve(settings) as server:
            settle(lambda: compiled_in_background(server.ports[2]))
            progress("the server is warm")
            return asyncio.run(_measure(server.ports[0], shape, rounds, tokens))


async def _measure(port: int, shape: ModelShape, rounds: int, tokens: int) -> dict[str, Any]:
    rng = random.Random(0)

    def prompts() -> list[list[int]]:
        return [[rng.randrange(shape.vocab_size) for _ in range(_PROMPT)] for _ in range(_STREAMS)]

    free: list[_Streams] = []
    constrained: list[_Streams] = []
    beside: list[_Streams] = []
    refusals: list[float] = []
    async with AsyncClient(f"127.0.0.1:{port}", resume_seconds=0.0) as client:
        # The process that makes masks begins with the first request that needs one.
        await _streams(client, prompts(), 4, json_schema=_SCHEMA)
        for number in range(rounds):
            free.append(await _streams(client, prompts(), tokens, ignore_eos=True))
            constrained.append(await _streams(client, prompts(), tokens, json_schema=_SCHEMA))
            over = asyncio.Event()
            hostile = [asyncio.create_task(_explode(client, rng, over)) for _ in range(2)]
            beside.append(await _streams(client, prompts(), tokens, ignore_eos=True))
            over.set()
            refusals += [seconds for each in await asyncio.gather(*hostile) for seconds in each]
            progress(
                f"round {number}: free {free[-1].tokens_per_second:.0f}, constrained "
                f"{constrained[-1].tokens_per_second:.0f} tokens/s; p95 of waits {free[-1].p95_ms:.1f}, "
                f"beside {beside[-1].p95_ms:.1f} ms; {len(refusals)} refused"
            )
    ratios = [
        c.tokens_per_second / f.tokens_per_second for c, f in zip(constrained, free, strict=True)
    ]
    p95 = [b.p95_ms / f.p95_ms for b, f in zip(beside, free, strict=True)]
    return {
        "structured": {
            "constrained_over_free": median(ratios),
            "p95_ratio": median(p95),
            "refused_s": round(max(refusals), 3),
            "exploding_refused": len(refusals),
        },
        "detail": {
            "tokens_per_second": {
                "free": spread([f.tokens_per_second for f in free], 1),
                "constrained": spread([c.tokens_per_second for c in constrained], 1),
            },
            "constrained_over_free": spread(ratios),
            "p95_ratio": spread(p95),
            "refused_s": spread(refusals, 3),
        },
    }


class _Streams:
    """What streams at once brought.

    Attributes:
      tokens_per_second: of all together.
      p95_ms: of how long one waited for its next message, which has several tokens where it reads slowly.
    """

    def __init__(self, arrivals: Sequence[Sequence[float]], begin: float, tokens: int):
        """`arrivals` are the times of each stream's messages, `tokens` those of all streams."""
        self.tokens_per_second = tokens / (max(times[-1] for times in arrivals) - begin)
        waits = [b - a for times in arrivals for a, b in itertools.pairwise([begin, *times])]
        self.p95_ms = percentile(waits, 95) * 1e3


async def _streams(
    client: AsyncClient, prompts: Sequence[Sequence[int]], tokens: int, **sampling: Any
) -> _Streams:
    """Answers to all prompts at once, each of so many tokens."""

    async def one(prompt: Sequence[int]) -> list[float]:
        times: list[float] = []
        count = 0
        async for chunk in client.stream("base", prompt, max_tokens=tokens, **sampling):
            if chunk.token_ids:
                times.append(time.perf_counter())
                count += len(chunk.token_ids)
        if count != tokens:
            raise RuntimeError(f"an answer has {count} tokens, {tokens} were asked for")
        return times

    begin = time.perf_counter()
    arrivals = await asyncio.gather(*map(one, prompts))
    return _Streams(arrivals, begin, tokens * len(prompts))


async def _explode(client: AsyncClient, rng: random.Random, over: asyncio.Event) -> list[float]:
    """Sends schemas that explode, one after another; how long each took to be refused, in seconds."""
    found = []
    while not over.is_set():
        patterns = [f".*{rng.randrange(10**6)}.*" for _ in range(18)]
        schema = {"allOf": [{"type": "string", "pattern": p} for p in patterns]}
        begin = time.perf_counter()
        try:
            await client.generate("base", [1], max_tokens=1, json_schema=schema)
        except ClientError as error:
            # On a slow machine it waits in vain for those before it to be looked at.
            if error.code not in ("INVALID_ARGUMENT", "UNAVAILABLE"):
                raise
            found.append(time.perf_counter() - begin)
        else:
            raise RuntimeError("a schema that explodes was taken")
    return found


def _zoo(folder: Path, shape: ModelShape) -> Path:
    """A zoo of one model over bytes, and words as far as its vocabulary goes."""
    memory = MemoryZoo(shape)
    memory.add_base("base")
    vocabulary = {
        letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    rng = random.Random(1)
    while len(vocabulary) < shape.vocab_size:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9)))
        vocabulary.setdefault(rng.choice(("", "Ġ")) + word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return save(memory, folder / "zoo", {"tokenizer.json": tokenizer.to_str().encode()})
