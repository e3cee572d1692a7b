"""What agents with real engines are asked, of a base and an adapter on it."""

import os
import signal
import time

from jblock.engine import api

BASE, ADAPTER = "demo-1m", "demo-1m-largest-lora12"
LONG = 600.0
PREFIX = tuple(5 + 7 * i % 120 for i in range(32))


def answers(engine: api.Engine, kill: tuple[int, ...] = ()) -> dict[str, list[int]]:
    """Tokens by request, of as many rounds as there are agents to kill, and one more."""
    engine.models()
    tokens: dict[str, list[int]] = {}
    limit = time.monotonic() + LONG
    for number, dead in enumerate((*kill, None)):
        running = set()
        for i in range(8):
            name, own = f"{number}/{i}", tuple(5 + (11 * j + i) % 120 for j in range(9 + i))
            drawn = {"temperature": 1.0, "seed": i} if i % 3 == 2 else {}
            sampling = api.SamplingParams(max_tokens=24, ignore_eos=True, **drawn)
            prompt = (*PREFIX, *own) if i < 4 else own
            model = (BASE, ADAPTER)[i % 2]
            request = api.Request(request_id=name, model=model, token_ids=prompt, sampling=sampling)
            tokens[name] = []
            running.add(name)
            engine.submit(request)
        while running:
            assert time.monotonic() < limit, "not in time"
            for output in engine.poll(0.1):
                tokens[output.request_id] += output.token_ids
                if output.finish_reason:
                    assert output.finish_reason == "length", output
                    running.remove(output.request_id)
            if dead is not None and any(len(tokens[name]) > 4 for name in running):
                os.kill(engine.pids[dead], signal.SIGKILL)
                dead = None
    return tokens
