"""An engine with no model: deterministic tokens, so that a server is tested without jax.

Each step gives every running request its next token: its prompt, over and over, each id shifted
by the model's offset. Pages and rows are counted as a real engine would, so a test can assert that
everything came back.
"""

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jblock.engine import api


@dataclasses.dataclass(frozen=True, kw_only=True)
class MockModel:
    """One pretended chain.

    Attributes:
      info: as `Engine.models` returns it.
      offset: added to each echoed id, modulo the vocabulary.
      eos_token_ids: ids that end a generation unless it ignores them.
      error_code: every request of this model fails with this status, after `error_after` tokens.
      error_after: how many tokens come before the error.
      misfit: `serve` refuses it with this message.
    """

    info: api.ModelInfo
    offset: int = 0
    eos_token_ids: tuple[int, ...] = ()
    error_code: str = ""
    error_after: int = 0
    misfit: str = ""


@dataclasses.dataclass
class _Running:
    """A request in flight and how far it came."""

    request: api.Request
    model: MockModel
    pages: int = 0
    generated: int = 0


class MockEngine(api.Engine):
    """Implements `jblock.engine.api.Engine` in a thread.

    Attributes:
      step_delay: seconds a step takes; tests may change it while it runs.
      zoo: chains that `serve` can find, the live version of a name last; tests may append to it.
    """

    def __init__(
        self,
        models: Sequence[MockModel],
        *,
        more: Sequence[MockModel] = (),
        serve_delay: float = 0.0,
        slow_model: str = "",
        slow_seconds: float = 0.0,
        step_delay: float = 0.0,
        start_delay: float = 0.0,
        max_num_seqs: int = 256,
        pages: int = 4096,
        page_size: int = 16,
        die_after_steps: int = 0,
        kill_token: int = -1,
        freeze_token: int = -1,
        fatal_after: int = 0,
    ):
        """Starts the loop.

        Args:
          models: what is served at first.
          more: what the pretended zoo has beside them.
          serve_delay: seconds `serve` takes.
          slow_model: a model that takes `slow_seconds` more to be read, as from storage that hangs.
          slow_seconds: see `slow_model`.
          step_delay: seconds a step takes.
          start_delay: seconds the warm-up takes.
          max_num_seqs: most requests running at once; the rest wait.
          pages: KV pages pretended to exist.
          page_size: tokens a page holds.
          die_after_steps: the loop ends with EngineDied after so many working steps; 0: never.
          kill_token: a prompt that has this id kills the process (SIGKILL), when its request has generated
            `fatal_after` tokens; only for an engine in a process of its own.
          freeze_token: the same, but the process is stopped (SIGSTOP).
          fatal_after: see `kill_token`.
        """
        self.step_delay = step_delay
        self.zoo = [*models, *more]
        self._serve_delay = serve_delay
        self._slow_model, self._slow_seconds = slow_model, slow_seconds
        self._models = {m.info.name: m for m in models}
        self._warm_at = time.monotonic() + start_delay
        self._max_num_seqs = max_num_seqs
        self._pages_total = self._pages_free = pages
        self._page_size = page_size
        self._die_after_steps = die_after_steps
        self._fatal = {kill_token: signal.SIGKILL, freeze_token: signal.SIGSTOP}
        self._fatal_after = fatal_after
        self._report: api.ReportRunning = lambda begun, ended: None
        self._reported: set[str] = set()
        self._changed = threading.Condition()
        self._waiting: list[_Running] = []
        self._running: dict[str, _Running] = {}
        self._outputs: list[api.Output] = []
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._closed = False
        self._died = ""
        self._thread = threading.Thread(target=self._loop, name="mock-engine", daemon=True)
        self._thread.start()

    def models(self) -> tuple[api.ModelInfo, ...]:
        """The models given, once the pretended warm-up is over."""
        time.sleep(max(0.0, self._warm_at - time.monotonic()))
        return tuple(m.info for m in self._models.values())

    def serve(
        self, models: Sequence[str], base: Sequence[str] | None = None
    ) -> tuple[api.ModelInfo, ...]:
        """Serves these chains of `zoo`; requests keep the version they were submitted to.

        Raises:
          UnknownChain: `zoo` does not have one.
          ValueError: one is told not to fit.
        """
        if base is None:
            base = [f"{m.info.name}@{m.info.version}" for m in self._models.values()]
        before = {name.partition("@")[0] for name in base}
        found = {m.info.name: m for m in map(self._find, models)}
        wanted = {m.partition("@")[0] for m in models if m not in base}
        added = {n: m for n, m in found.items() if n in wanted and self._models.get(n) is not m}
        time.sleep(self._serve_delay)
        if any(m.info.name == self._slow_model for m in added.values()):
            time.sleep(self._slow_seconds)
        for model in added.values():
            if model.misfit:
                raise ValueError(model.misfit)
        with self._changed:
            kept = {n: m for n, m in self._models.items() if n in found or n not in before}
            self._models = kept | added
            return tuple(m.info for m in self._models.values())

    def _find(self, model: str) -> MockModel:
        for known in reversed(self.zoo):
            if model in (known.info.name, f"{known.info.name}@{known.info.version}"):
                return known
        names = ", ".join(sorted({m.info.name for m in self.zoo}))
        raise api.UnknownChain(f"{model!r} is not in the zoo, which has {names}")

    def submit(self, request: api.Request) -> None:
        """Queues a request; an unknown model arrives as a NOT_FOUND Output."""
        with self._changed:
            model = self._models.get(request.model)
            if model is None:
                self._fail(request.request_id, "NOT_FOUND", f"model: no {request.model!r} here")
            elif request.version not in (0, model.info.version):
                self._fail(request.request_id, "ABORTED", "version: another is served by now")
            else:
                self._waiting.append(_Running(request, model, generated=len(request.generated)))
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Ends a request and frees its pages at once."""
        with self._changed:
            waiting = [w for w in self._waiting if w.request.request_id != request_id]
            if len(waiting) == len(self._waiting) and request_id not in self._running:
                return
            self._waiting = waiting
            self._end(request_id, "cancelled")

    def poll(self, timeout: float) -> list[api.Output]:
        """Outputs since the last call.

        Raises:
          EngineDied: after `die_after_steps`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self._died or self._closed, timeout)
            outputs, self._outputs = self._outputs, []
            if not outputs and self._died:
                raise api.EngineDied(self._died)
            return outputs

    def stats(self) -> api.EngineStats:
        """Counters of what was pretended."""
        with self._changed:
            return api.EngineStats(
                steps=self._steps,
                block_calls=self._steps,
                block_rows=self._prompt_tokens + self._generated_tokens,
                model_calls=self._steps,
                running=len(self._running),
                waiting=len(self._waiting),
                pages_free=self._pages_free,
                pages_total=self._pages_total,
                rows_free=self._max_num_seqs - len(self._running),
                rows_total=self._max_num_seqs,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
            )

    def report_running(self, report: api.ReportRunning) -> None:
        """Has the ids of running requests reported before each step."""
        self._report = report

    def close(self) -> None:
        """Stops the loop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._running or self._closed or self._died
                )
                if self._closed or self._died:
                    return
                self._step()
            time.sleep(self.step_delay)

    def _step(self) -> None:
        """Admits what fits, then gives each running request one token."""
        while self._waiting and len(self._running) < self._max_num_seqs:
            request = self._waiting[0].request
            length = len(request.token_ids) + request.sampling.max_tokens
            pages = -(-length // self._page_size)
            if pages > self._pages_free:
                break
            running = self._waiting.pop(0)
            running.pages = pages
            self._pages_free -= pages
            self._prompt_tokens += len(request.token_ids)
            self._running[request.request_id] = running
        begun, ended = self._running.keys() - self._reported, self._reported - self._running.keys()
        if begun or ended:
            self._report(tuple(sorted(begun)), tuple(sorted(ended)))
            self._reported = set(self._running)
        for running in list(self._running.values()):
            self._advance(running)
        self._steps += 1
        if self._steps == self._die_after_steps:
            self._died = f"mock engine: told to die after {self._steps} steps"
        self._changed.notify_all()

    def _advance(self, running: _Running) -> None:
        request, model = running.request, running.model
        name, sampling = request.request_id, request.sampling
        if model.error_code and running.generated >= model.error_after:
            self._fail(name, model.error_code, "model: told to fail; ask for another one")
            return
        prompt = request.token_ids
        if running.generated >= self._fatal_after:
            for fatal, number in self._fatal.items():
                if fatal in prompt:
                    os.kill(os.getpid(), number)
        token = prompt[running.generated % len(prompt)] + model.offset
        if sampling.temperature:
            # As a draw by seed and position would be: the same wherever the request runs.
            token += hash((sampling.seed, running.generated))
        token %= model.info.vocab_size
        ends = sampling.stop_token_ids
        if not sampling.ignore_eos:
            ends += model.eos_token_ids
        fields: dict[str, Any] = {}
        if sampling.prompt_logprobs and not running.generated:
            fields["prompt_logprobs"] = (-0.25,) * (len(prompt) - 1)
            # Every other token is the best one.
            fields["prompt_top_logprobs"] = tuple(
                ((token, -0.25) if at % 2 else ((token + 1) % model.info.vocab_size, -0.125),)
                for at, token in enumerate(prompt[1:])
            )
        if request.pooling:
            self._end(name, "stop", embedding=(3.0, -4.0, float(len(prompt))))
            return
        if token in ends and running.generated >= sampling.min_tokens:
            self._end(name, "stop", **fields)
            return
        running.generated += 1
        self._generated_tokens += 1
        fields["token_ids"] = (token,)
        if sampling.logprobs:
            fields["logprobs"] = (-0.5,)
        if sampling.top_logprobs:
            best = range(token, token + sampling.top_logprobs)
            top = tuple((t % model.info.vocab_size, -0.5 * (1 + t - token)) for t in best)
            fields["top_logprobs"] = (top,)
        if running.generated == sampling.max_tokens:
            self._end(name, "length", **fields)
        else:
            self._emit(api.Output(request_id=name, **fields))

    def _emit(self, output: api.Output) -> None:
        self._outputs.append(output)
        self._changed.notify_all()

    def _end(self, request_id: str, reason: str, **fields: Any) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            self._pages_free += running.pages
        self._emit(api.Output(request_id=request_id, finish_reason=reason, **fields))

    def _fail(self, request_id: str, code: str, message: str) -> None:
        self._end(request_id, "error", error_code=code, error_message=message)


def build_engine(
    *,
    models: Sequence[Mapping[str, Any]] = ({"name": "echo"},),
    more: Sequence[Mapping[str, Any]] = (),
    fail_at_start: str = "",
    exit_at_start: int = 0,
    **options: Any,
) -> MockEngine:
    """Builds a mock engine from plain data, as a process of its own needs it.

    Args:
      models: maps of fields of `ModelInfo` and `MockModel`; only `name` is required.
      more: the same, of what is in the zoo beside them.
      fail_at_start: raises ValueError with this message.
      exit_at_start: ends the process with this code.
      **options: of `MockEngine`.
    """
    if fail_at_start:
        raise ValueError(fail_at_start)
    if exit_at_start:
        os._exit(exit_at_start)
    return MockEngine(
        [mock_model(m) for m in models], more=[mock_model(m) for m in more], **options
    )


def mock_model(fields: Mapping[str, Any]) -> MockModel:
    """A model from plain data; see `build_engine`."""
    info: dict[str, Any] = {
        "version": 1,
        "family": "mock",
        "vocab_size": 512,
        "max_model_len": 1024,
    }
    names = {f.name for f in dataclasses.fields(api.ModelInfo)}
    rest: dict[str, Any] = {}
    for name, value in fields.items():
        target = info if name in names else rest
        target[name] = tuple(value) if isinstance(value, list) else value
    return MockModel(info=api.ModelInfo(**info), **rest)
