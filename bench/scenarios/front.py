"""What serving over gRPC and HTTP costs, beside the engine alone and beside servers that send constants."""

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer, decoders, models

from bench.front import clients
from bench.front.clients import Measured
from bench.front.process import ServerProcess, compiled_in_background, serve, settle
from bench.models import MODEL_250M, TINY, MemoryZoo, save
from bench.report import median, progress, spread
from jblock.engine.api import Request, SamplingParams
from jblock.engine.process.client import FACTORY, ProcessEngine

_STREAMS = 32
_PROMPT = 16
Prompts = Sequence[tuple[int, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--rounds", type=int, default=5, help="of each way, in turns")
    parser.add_argument("--tokens", type=int, default=96, help="of each of the 32 streams")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`grpc_over_engine`, `http_over_engine`: tokens/s over those of the engine's process alone. `ttfb_ms`:
    by how much the first byte of a lone request comes later, the worse of the two at p50. `grpc_over_bare`,
    `http_over_bare`: CPU time of the server's process for each token over that of a bare server of the same
    library that sends constants at the same pace, while an engine computes beside it too."""
    shape = TINY if args.quick else MODEL_250M
    rounds, tokens = (1, 32) if args.quick else (args.rounds, args.tokens)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        zoo = _zoo(Path(folder), shape)
        settings = {
            "zoo": str(zoo),
            "executable_cache": str(args.cache),
            "max_num_seqs": _STREAMS,
            "max_model_len": 512,
            "kv_memory_mb": 600,
        }

        def prompts(count: int = _STREAMS) -> Prompts:
            return [
                tuple(rng.randrange(shape.vocab_size) for _ in range(_PROMPT)) for _ in range(count)
            ]

        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(_engine(settings))
            server = stack.enter_context(serve(settings))
            settle(lambda: float(engine.stats().compiles_in_background))
            settle(lambda: compiled_in_background(server.ports[2]))
            progress("both engines are warm")
            figures = asyncio.run(_rounds(engine, server, prompts, rounds, tokens, stack))
    served = {name: figures[name] for name in ("grpc", "http")}
    own = figures["engine"]
    ratios = {
        name: [s.tokens_per_second / e.tokens_per_second for s, e in zip(each, own, strict=True)]
        for name, each in served.items()
    }
    over_bare = {
        name: [s.cpu_us / b.cpu_us for s, b in zip(each, figures[f"bare_{name}"], strict=True)]
        for name, each in served.items()
    }
    first = {name: statistics.median(times) * 1e3 for name, times in figures["first"].items()}
    later = max(first["grpc"], first["http"]) - first["engine"]
    return {
        "front": {
            **{f"{name}_over_engine": median(each) for name, each in ratios.items()},
            "ttfb_ms": round(later, 3),
            **{f"{name}_over_bare": median(each) for name, each in over_bare.items()},
        },
        "detail": {
            "tokens_per_second": {
                name: spread([m.tokens_per_second for m in figures[name]], 1)
                for name in ("engine", "grpc", "http")
            },
            "server_cpu_us_a_token": {
                name: spread([m.cpu_us for m in figures[name]], 1)
                for name in ("grpc", "bare_grpc", "http", "bare_http")
            },
            "over_engine": {name: spread(each) for name, each in ratios.items()},
            "over_bare": {name: spread(each) for name, each in over_bare.items()},
            "first_byte_ms": {name: round(value, 3) for name, value in first.items()},
        },
    }


async def _rounds(
    engine: "_Direct", server: "ServerProcess", prompts: Any, rounds: int, tokens: int, stack: Any
) -> dict[str, Any]:
    """Every way in turns, and the first bytes of lone requests."""
    figures: dict[str, Any] = {
        name: [] for name in ("engine", "grpc", "http", "bare_grpc", "bare_http")
    }
    first: dict[str, list[float]] = {name: [] for name in ("engine", "grpc", "http")}
    bare: ServerProcess | None = None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports[0]}") as channel:
        asks = {"grpc": clients.over_grpc(channel), "http": clients.over_http(server.ports[1])}
        for ask in asks.values():  # Connections, and code that is loaded when it is first used.
            await clients.measure(ask, prompts(), 8, server.pid)
        await asyncio.to_thread(engine.measure, prompts(), 8)
        for number in range(rounds):
            figures["engine"].append(await asyncio.to_thread(engine.measure, prompts(), tokens))
            if bare is None:
                interval = _STREAMS / figures["engine"][0].tokens_per_second
                command = [sys.executable, "-m", "bench.front.bare", str(interval)]
                bare = stack.enter_context(ServerProcess(command, r"(\d+) (\d+)"))
            for name, ask in asks.items():
                figures[name].append(await clients.measure(ask, prompts(), tokens, server.pid))
            async with grpc.aio.insecure_channel(f"127.0.0.1:{bare.ports[0]}") as other:
                bare_asks = {
                    "bare_grpc": clients.over_grpc(other),
                    "bare_http": clients.over_http(bare.ports[1]),
                }
                for name, ask in bare_asks.items():
                    with engine.busy(prompts()):
                        figures[name].append(
                            await clients.measure(ask, prompts(), tokens, bare.pid)
                        )
            for _ in range(8):
                first["engine"] += await asyncio.to_thread(engine.first_tokens, prompts(1))
                for name, ask in asks.items():
                    first[name] += await clients.first_bytes(ask, prompts(1))
            last = {name: each[-1] for name, each in figures.items()}
            progress(
                f"round {number}: "
                + ", ".join(
                    f"{name} {m.tokens_per_second:.0f} tokens/s {m.cpu_us:.1f} us"
                    for name, m in last.items()
                )
            )
    return {**figures, "first": first}


class _Direct:
    """An engine's process, asked without a server."""

    def __init__(self, engine: ProcessEngine):
        self._engine = engine
        self._count = 0
        self.stats = engine.stats

    def measure(self, prompts: Prompts, tokens: int) -> Measured:
        """As `clients.measure`; the CPU time is not looked at."""
        begin = time.perf_counter()
        ids = self._submit(prompts, tokens)
        firsts: dict[str, float] = {}
        while ids:
            for output in self._engine.poll(1.0):
                firsts.setdefault(output.request_id, time.perf_counter() - begin)
                if output.finish_reason:
                    ids.discard(output.request_id)
        seconds = time.perf_counter() - begin
        return Measured(len(prompts) * tokens / seconds, tuple(firsts.values()), 0.0)

    def first_tokens(self, prompts: Prompts) -> list[float]:
        """As `clients.first_bytes`."""
        return [self.measure([prompt], 1).first_token_s[0] for prompt in prompts]

    @contextlib.contextmanager
    def busy(self, prompts: Prompts) -> Iterator[None]:
        """The engine decodes for nobody."""
        ids = self._submit(prompts, 480)
        over = threading.Event()

        def discard() -> None:
            while not over.is_set() or ids:
                for output in self._engine.poll(0.2):
                    if output.finish_reason:
                        ids.discard(output.request_id)

        thread = threading.Thread(target=discard)
        thread.start()
        try:
            yield
        finally:
            for request_id in list(ids):
                self._engine.cancel(request_id)
            over.set()
            thread.join()

    def _submit(self, prompts: Prompts, tokens: int) -> set[str]:
        ids = set()
        for prompt in prompts:
            self._count += 1
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
            request = Request(
                request_id=str(self._count), model="base", token_ids=prompt, sampling=sampling
            )
            self._engine.submit(request)
            ids.add(request.request_id)
        return ids


@contextlib.contextmanager
def _engine(settings: dict[str, Any]) -> Iterator[_Direct]:
    engine = ProcessEngine(FACTORY, settings)
    try:
        engine.models()
        yield _Direct(engine)
    finally:
        engine.close()


def _zoo(folder: Path, shape: Any) -> Path:
    """A zoo of one model whose every id is a word of text, in a byte-level vocabulary."""
    memory = MemoryZoo(shape)
    memory.add_base("base")
    words = {f"Ġ{_letters(i)}": i for i in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="Ġaaaa"))
    tokenizer.decoder = decoders.ByteLevel()
    return save(memory, folder / "zoo", {"tokenizer.json": tokenizer.to_str().encode()})


def _letters(number: int) -> str:
    letters = ""
    for _ in range(clients.TOKEN_CHARACTERS - 1):
        number, at = divmod(number, 26)
        letters += chr(97 + at)
    return letters
