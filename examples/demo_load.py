"""Many streams at once against a server, each over a real socket."""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence

from examples.demo_reference import Item
from serving.client import AsyncClient
from serving.values import ClientError

_CONNECTIONS = 4
_REQUEST_SECONDS = 120.0
_SEED = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server said to one item.

    Attributes:
      item: what was asked.
      as_text: the prompt went as text; else as token ids.
      token_ids: generated, without the end-of-sequence token.
      text: generated.
      finish_reason: "stop" or "length".
      first_token_ms: from sending to the first token, as the client saw it; 0 for an empty answer.
      total_ms: from sending to the end.
      error: why there is no answer; "" when there is one.
    """

    item: Item
    as_text: bool
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    error: str = ""


def shuffled(items: Sequence[Item], count: int | None = None) -> list[Item]:
    """The items, models mixed, in the same order every time; `count` of them if given."""
    mixed = list(items)
    random.Random(_SEED).shuffle(mixed)
    return mixed[:count]


async def ask_all(
    target: str, items: Sequence[Item], streams: int, on_answer: Callable[[], None]
) -> tuple[list[Answer], float]:
    """Asks everything, `streams` requests at a time; every other prompt goes as token ids.

    Args:
      target: "host:port".
      items: what to ask, in this order.
      streams: requests in flight.
      on_answer: called after each.

    Returns:
      The answers in the order they ended, and the seconds all took.
    """
    work = iter(enumerate(items))
    answers: list[Answer] = []
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(target, timeout=_REQUEST_SECONDS))
            for _ in range(min(_CONNECTIONS, streams))
        ]

        async def stream(client: AsyncClient, work: Iterator[tuple[int, Item]]) -> None:
            for number, item in work:
                answers.append(await ask(client, item, as_text=number % 2 == 0))
                on_answer()

        begin = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(streams):
                group.create_task(stream(clients[number % len(clients)], work))
        return answers, time.monotonic() - begin


async def ask(client: AsyncClient, item: Item, *, as_text: bool) -> Answer:
    """Asks one thing and reads the stream to its end; an error becomes part of the answer."""
    prompt = item.prompt if as_text else item.prompt_ids
    ids: list[int] = []
    texts: list[str] = []
    finish_reason, first, usage = None, 0.0, None
    begin = time.monotonic()
    try:
        async for chunk in client.stream(item.model, prompt, max_tokens=item.max_tokens):
            if chunk.token_ids and not ids:
                first = time.monotonic() - begin
            ids.extend(chunk.token_ids)
            texts.append(chunk.text)
            finish_reason, usage = chunk.finish_reason, chunk.usage
    except ClientError as error:
        return Answer(item=item, as_text=as_text, error=str(error))
    total = time.monotonic() - begin
    error = ""
    if usage is None:
        error = "the stream ended without a finish_reason and usage"
    elif usage.prompt_tokens != len(item.prompt_ids):
        error = (
            f"the server made {usage.prompt_tokens} tokens of a prompt that has "
            f"{len(item.prompt_ids)}: its tokenizer is not the reference's"
        )
    return Answer(
        item=item,
        as_text=as_text,
        token_ids=tuple(ids),
        text="".join(texts),
        finish_reason=finish_reason,
        first_token_ms=1000 * first,
        total_ms=1000 * total,
        error=error,
    )
