"""A model in spans on two processes of one core each, over one process of one core; and what a hop takes."""

import argparse
import dataclasses
import queue
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.exactness import LOGIT_ERROR, logit_gap
from bench.models import MODEL_250M, TINY, MemoryZoo, save
from bench.report import progress
from jblock.engine.api import Engine, Request, SamplingParams
from jblock.engine.process.client import FACTORY, ProcessEngine
from jblock.engine.process.seats import Seat, share_out
from jblock.scheduler.pipeline import Pipeline

_AGENTS, _STREAMS = 2, 32
_HOP_ROWS, _HOP_WIDTH = 32, 1024
_HOPS = ("shared_memory", "grpc")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`pipeline_ratio`: tokens/s of 64 streams on two agents over those of 32 streams on one. `identical`: of
    the streams that both had, those with equal tokens, and `differ` those that part beyond the token rule."""
    shape, tokens = (TINY, 8) if args.quick else (MODEL_250M, 64)
    zoo = MemoryZoo(shape)
    chain = zoo.add_base("base")
    few = _requests(shape.vocab_size, _STREAMS, tokens)
    many = _requests(shape.vocab_size, _AGENTS * _STREAMS, tokens)
    with tempfile.TemporaryDirectory(prefix="jblock-") as folder:
        kwargs: dict[str, Any] = {
            "zoo": str(save(zoo, Path(folder, "zoo"))),
            "executable_cache": str(args.cache),
            "kv_memory_mb": 600,
            "max_num_seqs": _AGENTS * _STREAMS,
            "decode_sizes": [8, 16, 32, 64],
            "prefill_grids": [[4, 64]],
        }
        seats = share_out(_AGENTS, 1)
        one = _serve(ProcessEngine(FACTORY, kwargs, seat=Seat(seats[0].cores[:1])), few)
        progress(f"one agent: {one.tokens_per_second:.1f} tokens/s")

        def start(agent: int, served: Sequence[str], notify: Any) -> ProcessEngine:
            own = {**kwargs, "span_agent": agent, "span_agents": _AGENTS, "span_folder": folder}
            seat = Seat(seats[agent].cores[:1], seats[agent].environment)
            return ProcessEngine(FACTORY, own, seat=seat, notify=notify)

        two = _serve(Pipeline(start, _AGENTS), many)
        progress(f"two agents: {two.tokens_per_second:.1f} tokens/s")
    gaps = _gaps(zoo, chain, few, one.tokens, two.tokens)
    rounds = 20 if args.quick else 500
    return {
        "cluster": {
            "failed": one.failed + two.failed,
            "identical": len(few) - len(gaps),
            "differ": sum(gap >= 10 * LOGIT_ERROR for gap in gaps),
            "pipeline_ratio": round(two.tokens_per_second / one.tokens_per_second, 3),
            **{f"hop_ms_{kind}_idle": round(hop_ms(kind, rounds), 4) for kind in _HOPS},
        },
        "compiles_on_serving_path": one.compiles + two.compiles,
        "detail": {
            "tokens_per_second": [round(m.tokens_per_second, 1) for m in (one, two)],
            "streams": [len(few), len(many)],
        },
    }


@dataclasses.dataclass(frozen=True)
class _Served:
    """What requests brought.

    Attributes:
      tokens: by request id.
      failed: requests that did not run to their length.
      tokens_per_second: from the first request to the last one's end, prompts included.
      compiles: programs compiled while they waited.
    """

    tokens: dict[str, list[int]]
    failed: int
    tokens_per_second: float
    compiles: int


def _serve(engine: Engine, requests: Sequence[Request]) -> _Served:
    """Sends requests twice, for a first time brings what is learned by running; closes the engine."""
    try:
        engine.models()
        while engine.stats().compiles_in_background and _grew(engine):
            pass
        _once(engine, requests)
        return _once(engine, requests)
    finally:
        engine.close()


def _grew(engine: Engine) -> bool:
    """Whether programs were compiled within a second."""
    before = engine.stats().compiles_in_background
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        engine.poll(0.1)
    return engine.stats().compiles_in_background > before


def _once(engine: Engine, requests: Sequence[Request]) -> _Served:
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    ended, failed, begin = 0, 0, time.monotonic()
    for request in requests:
        engine.submit(request)
    while ended < len(tokens):
        for output in engine.poll(1.0):
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                ended += 1
                failed += output.finish_reason != "length"
    speed = sum(map(len, tokens.values())) / (time.monotonic() - begin)
    return _Served(tokens, failed, speed, engine.stats().compiles_on_serving_path)


def _requests(vocab: int, count: int, tokens: int) -> list[Request]:
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return [
        Request(
            request_id=f"r{i}",
            model="base",
            token_ids=tuple(int(t) for t in rng.integers(0, vocab, 32)),
            sampling=sampling,
        )
        for i in range(count)
    ]


def _gaps(zoo: Any, chain: Any, requests: Sequence[Request], one: Any, two: Any) -> list[float]:
    """For each request with other tokens, how near the two best logits were where they part."""
    gaps = []
    for request in requests:
        a, b = one[request.request_id], two[request.request_id]
        if a != b:
            same = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            gaps.append(logit_gap(zoo, chain, (*request.token_ids, *a[:same])))
    return gaps


def hop_ms(kind: str, rounds: int) -> float:
    """Half of the median time in which rows go to another process and come back, both idle.

    Args:
      kind: "shared_memory" or "grpc".
      rounds: how often.
    """
    from jblock.engine.spans.messages import Gone, RowItem, Rows

    values = np.zeros((_HOP_ROWS, _HOP_WIDTH), np.float32)
    items = tuple(RowItem(key=i, span=0, start=100, q_len=1, chunk=1) for i in range(_HOP_ROWS))
    message = Rows(width=_HOP_WIDTH, items=items)
    received: queue.SimpleQueue = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="jblock-") as folder:
        secret = Path(folder, "secret")
        secret.touch(0o600)
        secret.write_text(secrets.token_hex(32))
        home = _port(kind, 0, folder)
        home.listen(lambda *sent: received.put(sent))
        command = "import sys; from bench.scenarios.cluster import echo; echo(*sys.argv[1:])"
        child = subprocess.Popen(
            [sys.executable, "-c", command, kind, folder], stdin=subprocess.PIPE
        )
        try:
            assert received.get(timeout=120)[:2] == (1, Gone())
            times = []
            for _ in range(rounds):
                begin = time.perf_counter()
                home.send(1, message, values)  # type: ignore[arg-type]
                received.get(timeout=60)
                times.append(time.perf_counter() - begin)
            return 1e3 * statistics.median(times) / 2
        finally:
            home.close()
            child.communicate()


def _port(kind: str, agent: int, folder: str) -> Any:
    from jblock.engine.spans.network import NetworkPort
    from jblock.engine.spans.sockets import SocketPort
    from jblock.parallel.placement import SINGLE

    if kind == "shared_memory":
        return SocketPort(agent, Path(folder), SINGLE)
    file = Path(folder, "address")
    if not agent:
        with socket.create_server(("127.0.0.1", 0)) as free:
            file.write_text(f"127.0.0.1:{free.getsockname()[1]}")
    address = file.read_text()
    files = {"secret_file": f"{folder}/secret"}
    return NetworkPort(agent, SINGLE, session="s", home=address, listen=address, files=files)


def echo(kind: str, folder: str) -> None:
    """The other process of `hop_ms`: sends rows back until its standard input ends."""
    from jblock.engine.spans.messages import Rows

    port = _port(kind, 1, folder)

    def back(sender: int, message: Any, rows: Any) -> None:
        if isinstance(message, Rows):
            port.send(sender, message, rows)

    port.listen(back)
    sys.stdin.read()
