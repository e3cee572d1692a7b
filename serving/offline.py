"""Batches without a server: `from jblock import LLM`.

with LLM("my-zoo") as llm:
    for answer in llm.generate(["Once upon", "In the end"], model="story", max_tokens=40):
        print(answer.text)

What a server would do with each prompt happens here in this process: the same checks, batches and answers.
"""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Unpack

from rich.console import Console
from rich.progress import Progress

from jblock.engine import api
from jblock.engine.process.server import load_factory
from serving.call_info import CallInfo
from serving.changes import Changes
from serving.chat.renderer import Renderer
from serving.dispatcher import Dispatcher
from serving.errors import RequestError
from serving.generation import Ask, Generator
from serving.messages import collect
from serving.metrics import Metrics
from serving.service import ask_of
from serving.structured.grammars import Grammars
from serving.v1 import jblock_pb2 as pb
from serving.values import Chunk, ClientError, Message, Sampling, to_chat, to_chunk, to_request

# Prompts in the engine at a time: enough for full batches, and not all of a long list.
_AT_ONCE = 256
# Most answers that one prompt may have.
_MOST_SAMPLES = 16
T = TypeVar("T")
Prompt = str | Sequence[int]
Conversation = str | Sequence[Message]


class LLM:
    """The models of a zoo, in this process. Close it, or use it as a context.

    Attributes:
      models: names of the models.
    """

    def __init__(self, zoo: str, *, models: Sequence[str] = (), **settings: Any):
        """Loads models and compiles first programs, which takes some seconds.

        Args:
          zoo: folder or URL of the zoo.
          models: to load, "name" or "name@version"; when empty all that are exact.
          **settings: as `jblock.engine.config.EngineConfig` has them.

        Raises:
          ValueError: the zoo, a model or a setting cannot be used.
        """
        build = load_factory("jblock.engine.factory:build_engine")
        self._begin(build(zoo=zoo, models=list(models), **settings))

    @classmethod
    def of(cls, engine: api.Engine) -> "LLM":
        """Around an engine, which it takes over."""
        made = cls.__new__(cls)
        made._begin(engine)
        return made

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        model: str | None = None,
        progress: bool | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Chunk]:
        """The answers to texts, or to lists of token ids, in their order.

        Args:
          prompts: one, or many.
          model: who answers; the only one there is may be left out.
          progress: shows a bar; by default where standard error is a terminal.
          **sampling: as of `serving.client.Client.generate`.

        Raises:
          ClientError: a prompt cannot be answered; the message says which.
          ValueError: a value fits no request.
        """
        name = self._name(model)
        requests = [to_request(name, prompt, sampling) for prompt in _listed(prompts)]
        return self._answer([Ask(request=request) for request in requests], progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        template_variables: Mapping[str, Any] | None = None,
        tool_choice: str = "",
        progress: bool | None = None,
        **sampling: Unpack[Sampling],
    ) -> list[Chunk]:
        """What an instruct model says next in conversations, each a text of its user or a list of messages.

        Arguments and errors as of `generate` and `serving.client.Client.chat`.
        """
        name = self._name(model)
        asks = []
        for conversation in _conversations(conversations):
            chat = to_chat(
                conversation, tools, template_variables=template_variables, tool_choice=tool_choice
            )
            with _translated(""):
                asks.append(ask_of(to_request(name, chat, sampling)))
        return self._answer(asks, progress)

    def close(self) -> None:
        """Frees the models."""
        if self._loop.is_closed():
            return
        self._run(self._renderer.close())
        self._run(self._grammars.close())
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _begin(self, engine: api.Engine) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        try:
            self._run(self._start(engine))
        except BaseException:
            self.close()
            raise
        self.models = tuple(sorted(self._dispatcher.models))

    async def _start(self, engine: api.Engine) -> None:
        self._dispatcher = dispatcher = Dispatcher(engine, _AT_ONCE * _MOST_SAMPLES)
        self._renderer, self._grammars = Renderer(), Grammars()
        metrics = Metrics(engine.stats, lambda: 0, lambda: 1)
        self._generator = Generator(
            dispatcher, Changes(dispatcher), self._renderer, self._grammars, metrics
        )
        dispatcher.start()
        ready, dead = (asyncio.ensure_future(e.wait()) for e in (dispatcher.ready, dispatcher.dead))
        await asyncio.wait((ready, dead), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        dead.cancel()
        if dispatcher.failure is not None:
            raise dispatcher.failure

    async def _end(self) -> None:
        self._dispatcher.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _name(self, model: str | None) -> str:
        if model is None:
            if len(self.models) > 1:
                raise ValueError(f"model: is missing; name one of {', '.join(self.models)}")
            return self.models[0]
        return model

    def _answer(self, asks: Sequence[Ask], progress: bool | None) -> list[Chunk]:
        shown = sys.stderr.isatty() if progress is None else progress
        with Progress(console=Console(stderr=True), disable=not shown) as bar:
            task = bar.add_task("answers", total=len(asks))
            answers = self._run(self._all(asks, lambda: bar.advance(task)))
        return [to_chunk(answer) for answer in answers]

    async def _all(self, asks: Sequence[Ask], done: Any) -> list[pb.GenerateResponse]:
        """The answers, so many at a time as there are places; the first failure ends all."""
        places = asyncio.Semaphore(_AT_ONCE)
        answers: list[Any] = [None] * len(asks)

        async def one(at: int, ask: Ask) -> None:
            async with places:
                call = CallInfo(protocol="offline")
                with call.held, _translated(f"prompt {at}: "):
                    parts = self._generator.parts([ask], call)
                    async with contextlib.aclosing(parts):
                        answers[at] = await collect(parts)
                done()

        tasks = [asyncio.ensure_future(one(at, ask)) for at, ask in enumerate(asks)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return answers


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _conversations(given: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if isinstance(given, str) or (given and isinstance(given[0], Mapping)):
        return [given]  # type: ignore[list-item]
    return list(given)  # type: ignore[arg-type]


@contextlib.contextmanager
def _translated(where: str) -> Iterator[None]:
    """Refusals as clients of a server see them."""
    try:
        yield
    except RequestError as error:
        raise ClientError(error.code.name, where + error.message) from error
