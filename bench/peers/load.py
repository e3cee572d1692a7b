"""What every engine is asked to do, and how its answers are timed: the same for all, drivers apart.

A driver is `python -m bench.peers.NAME SPEC`, SPEC being a JSON file:

* `work`: "single" (one model; decoding at several numbers of streams, and prefill), "tenants" (many
  models, all requests at once), or "prepare" (whatever the engine needs made of the checkpoints).
* `dtype`: "float32" or "bfloat16".
* `models`: name -> folder of a Hugging Face checkpoint; `adapters`: name -> folder of a PEFT adapter on
  the model "base". Token ids are all that is sent: there are no tokenizers.
* `threads`: CPUs to compute on. `folder`: one of the driver's own, kept between runs.
* `sizes`: as `Sizes` in bench/scenarios/peers.py.
* `out`: file that gets a line of JSON when the engine is ready, and one with the result.
"""

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class Ask:
    """One greedy request that runs to `max_tokens`, whatever it generates."""

    model: str
    prompt: tuple[int, ...]
    max_tokens: int


class Clock:
    """When every token of every request came, seconds since all were handed over.

    Attributes:
      asks: the requests.
      times: one list a request.
      ids: the tokens themselves, likewise.
    """

    def __init__(self, asks: Sequence[Ask]):
        """Starts the clock."""
        self.asks = list(asks)
        self.times: list[list[float]] = [[] for _ in asks]
        self.ids: list[list[int]] = [[] for _ in asks]
        self._begin = time.perf_counter()

    def note(self, request: int, ids: Sequence[int]) -> None:
        """These tokens of a request are in the client's hands now."""
        self.times[request].extend([time.perf_counter() - self._begin] * len(ids))
        self.ids[request].extend(ids)

    def check(self) -> "Clock":
        """Itself.

        Raises:
          RuntimeError: a request brought more or fewer tokens than were asked for.
        """
        for i, (ask, times) in enumerate(zip(self.asks, self.times, strict=True)):
            if len(times) != ask.max_tokens:
                raise RuntimeError(
                    f"request {i} to {ask.model!r} brought {len(times)} tokens, not the "
                    f"{ask.max_tokens} asked for"
                )
        return self

    @property
    def seconds(self) -> float:
        """Until the last token of all."""
        return max(t[-1] for t in self.times)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return sum(map(len, self.times)) / self.seconds

    @property
    def decode_rate(self) -> float:
        """Tokens/s while all streams decode: after the last first token, until the first last one."""
        begin = max(t[0] for t in self.times)
        end = min(t[-1] for t in self.times)
        if end <= begin:
            raise RuntimeError("no time in which all streams decoded: ask for more tokens")
        return sum(begin < t <= end for times in self.times for t in times) / (end - begin)

    @property
    def latencies(self) -> list[float]:
        """Seconds until each request's last token."""
        return [t[-1] for t in self.times]


_SHOWN = 4


class Peer(Protocol):
    """An engine under test. The constructor takes the spec and returns when requests may come."""

    def run(self, clock: Clock) -> None:
        """Serves all of the clock's requests, handed over at once, and notes their tokens."""

    def close(self) -> None:
        """Stops the engine."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` % of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(int(-(-len(ordered) * percent // 100)), 1) - 1]


def single(peer: Peer, spec: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Decode tokens/s by number of streams, and prefill tokens/s: medians over rounds."""
    sizes = spec["sizes"]
    draw = _Prompts(spec, "single")

    def decode(streams: int, tokens: int) -> Clock:
        asks = [Ask("base", draw(sizes["decode_prompt"]), tokens) for _ in range(streams)]
        return serve(peer, asks)

    def prefill() -> float:
        return serve(peer, [Ask("base", draw(sizes["prefill"]), 1)]).times[0][0]

    result: dict[str, Any] = {"decode": {}}
    for streams in sizes["streams"]:
        decode(streams, 8)
        rates = [
            decode(streams, sizes["decode_tokens"]).decode_rate for _ in range(sizes["rounds"])
        ]
        result["decode"][str(streams)] = _median(rates)
        say(f"{streams} streams: {result['decode'][str(streams)]} tokens/s")
    prefill()
    times = [prefill() for _ in range(2 * sizes["rounds"])]
    result["prefill"] = _median([sizes["prefill"] / t for t in times])
    say(f"prefill: {result['prefill']} tokens/s")
    return result


def tenants(peer: Peer, spec: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """All models at once: seconds, tokens/s and the 95th percentile of latency; medians over rounds."""
    sizes = spec["sizes"]
    draw = _Prompts(spec, "tenants")
    names = sorted([*spec["models"], *spec["adapters"]])

    def everybody(tokens: int) -> Clock:
        models = [names[i % len(names)] for i in range(sizes["requests"])]
        return serve(peer, [Ask(m, draw(sizes["prompt"]), tokens) for m in models])

    shown = everybody(_SHOWN)
    clocks = []
    for _ in range(sizes["rounds"]):
        clocks.append(everybody(sizes["tokens"]))
        say(f"{len(names)} tenants: {clocks[-1].seconds:.2f} s")
    return {
        "seconds": _median([c.seconds for c in clocks]),
        "tokens_per_second": _median([c.tokens_per_second for c in clocks]),
        "p95_s": _median([percentile(c.latencies, 95) for c in clocks]),
        "first_token_p95_s": _median([percentile([t[0] for t in c.times], 95) for c in clocks]),
        # What every engine must agree on, but for near ties: so each did serve these models.
        "first_ids": {a.model: ids[:_SHOWN] for a, ids in zip(shown.asks, shown.ids, strict=True)},
    }


def serve(peer: Peer, asks: Sequence[Ask]) -> Clock:
    """Hands all requests over and waits for every token of them.

    Raises:
      RuntimeError: not as many tokens came as were asked for.
    """
    clock = Clock(asks)
    peer.run(clock)
    return clock.check()


def main(peer_type: Callable[[Mapping[str, Any]], Peer]) -> None:
    """A driver's command line; see the top of this file."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    out = Path(spec["out"])

    def write(line: Mapping[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    peer = peer_type(spec)
    write({"ready": time.time()})
    try:
        result = {"single": single, "tenants": tenants}[spec["work"]](peer, spec, say)
        write({"result": result | getattr(peer, "notes", {})})
    finally:
        peer.close()


class _Prompts:
    """Prompts that no cache has seen."""

    def __init__(self, spec: Mapping[str, Any], name: str):
        self._random, self._vocab = random.Random(name), spec["sizes"]["vocab"]

    def __call__(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._vocab) for _ in range(length))


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)
