"""`python -m bench.front.bare INTERVAL`: servers of the libraries that jblock serves with, sending constants.

One gRPC and one HTTP server in one event loop. Every stream gets a constant message every INTERVAL seconds,
all at one tick, as the steps of an engine come; nothing is parsed, looked up or written but the bytes. It
prints the two ports and serves until it is ended.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvicorn

from serving.v1 import jblock_pb2 as pb

# As long as what jblock sends for a token.
_EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"base","choices":[{"index":0,"text":" abcd","logprobs":null,"finish_reason":null}],'
    b'"system_fingerprint":"base@1","policy":"exact"}\n\n'
)
_MESSAGE = pb.GenerateStreamResponse(
    text=" abcd", token_ids=[12345], policy=pb.POLICY_EXACT, model="base", model_version=1
).SerializeToString()
_DONE = b"data: [DONE]\n\n"


class _Ticker:
    """Wakes all who wait, every so many seconds."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._event = asyncio.Event()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            event, self._event = self._event, asyncio.Event()
            event.set()

    async def wait(self) -> None:
        await self._event.wait()


class _Stream(grpc.GenericRpcHandler):
    """Answers every method with a stream of as many messages as the request asks for tokens."""

    def __init__(self, ticker: _Ticker):
        self._ticker = ticker

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(self._answer)

    async def _answer(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(pb.GenerateRequest.FromString(request).max_tokens):
            await self._ticker.wait()
            await context.write(_MESSAGE)


def _app(ticker: _Ticker) -> Any:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        count = int(scope["query_string"])
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(count):
            await ticker.wait()
            await send({"type": "http.response.body", "body": _EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": _DONE})

    return answer


async def _main(seconds: float) -> None:
    ticker = _Ticker(seconds)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Stream(ticker),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    config = uvicorn.Config(
        _app(ticker), port=0, loop="none", http="httptools", lifespan="off", log_config=None
    )
    http = uvicorn.Server(config)
    task = asyncio.create_task(http.serve())
    while not http.started:
        await asyncio.sleep(0.01)
    http_port = http.servers[0].sockets[0].getsockname()[1]
    print(f"{port} {http_port}", flush=True)
    await asyncio.gather(ticker.run(), task)


if __name__ == "__main__":
    asyncio.run(_main(float(sys.argv[1])))
