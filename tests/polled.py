"""What an engine answers, polled as a server would; and requests to mock engines."""

import collections
import threading
import time

from jblock.engine import api

# Waits of a loaded machine; nothing here takes so long by itself.
LONG = 60.0


class Reader(threading.Thread):
    """Polls an engine as a server would, and keeps what came by request.

    Attributes:
      tokens: by request id.
      ends: the last output of each request that ended.
      failure: what ended the polling.
    """

    def __init__(self, engine: api.Engine):
        super().__init__(daemon=True)
        self.tokens: dict[str, list[int]] = collections.defaultdict(list)
        self.ends: dict[str, api.Output] = {}
        self.prompt_logprobs: dict[str, list[float]] = {}
        self.failure: Exception | None = None
        self.stopping = False
        self._engine = engine

    def run(self) -> None:
        try:
            self._engine.models()
            while not self.stopping:
                for output in self._engine.poll(0.05):
                    assert output.request_id not in self.ends
                    self.tokens[output.request_id] += output.token_ids
                    scores = self.prompt_logprobs.setdefault(output.request_id, [])
                    scores.extend(output.prompt_logprobs)
                    if output.finish_reason:
                        self.ends[output.request_id] = output
        except Exception as error:
            self.failure = error


def until(check, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def request(name: str, prompt=(7, 8, 9), model: str = "echo", **sampling) -> api.Request:
    options = {"max_tokens": 60, **sampling}
    return api.Request(
        request_id=name,
        model=model,
        token_ids=tuple(prompt),
        sampling=api.SamplingParams(**options),
    )


def echoed(prompt, count: int, offset: int = 0) -> list[int]:
    return [prompt[i % len(prompt)] + offset for i in range(count)]
