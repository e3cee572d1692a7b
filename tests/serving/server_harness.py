"""A server on a real socket in a thread of this process, in front of a mock engine."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from tokenizer_fixtures import byte_level

from jblock.engine import api
from jblock.engine.process.mock import MockEngine, build_engine
from serving.client import Client
from serving.server import Server, ServerConfig
from serving.v1 import jblock_pb2 as pb
from serving.v1 import jblock_pb2_grpc

VOCAB_SIZE = 410  # More than the tokenizer has, as models pad theirs.


class Running:
    """A running server, its engine, and ways to talk to it.

    Attributes:
      engine: what is behind it.
      target: "host:port".
      client: our client.
      stub: the bare stub, for what the client would not send.
    """

    def __init__(self, engine: api.Engine, config: ServerConfig, warm: bool):
        self.engine: Any = engine
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.call(self._make(config))
        self.call(self.server.start())
        if warm:
            self.call(self.server.warm())
        self.target = f"127.0.0.1:{self.server.port}"
        self.client = Client(self.target, timeout=60.0, resume_seconds=0.0)
        self.channel = grpc.insecure_channel(self.target)
        self.stub = jblock_pb2_grpc.InferenceStub(self.channel)

    async def _make(self, config: ServerConfig) -> Server:
        return Server(config, self.engine)

    def call(self, coroutine: Any) -> Any:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20.0)

    def stop(self) -> None:
        self.client.close()
        self.channel.close()
        self.call(self.server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def is_empty(self) -> bool:
        """Whether every page, row and place came back."""
        stats = self.engine.stats()
        return (
            stats.pages_free == stats.pages_total
            and stats.rows_free == stats.rows_total
            and stats.running == stats.waiting == 0
            and self.server._dispatcher.num_open == 0
        )


@contextlib.contextmanager
def serving(engine: api.Engine, *, warm: bool = True, **config: Any) -> Iterator[Running]:
    """A server that is gone afterwards."""
    running = Running(engine, ServerConfig(**{"drain_seconds": 1.0, **config}), warm)
    try:
        yield running
    finally:
        running.stop()


# What `mock` serves, in the order of lists.
MODELS = ("adapter", "broken", "echo", "ids", "lora", "rounded", "small")


def mock(folder: Path, **options: Any) -> MockEngine:
    """A mock with a text model, an ids-only one, and ones that err."""
    text = {"vocab_size": VOCAB_SIZE, "tokenizer_path": save_tokenizer(folder)}
    models = [
        {"name": "echo", **text, "version": 3, "blocks": 5, "shared_blocks": 4},
        {"name": "adapter", **text, "base": "echo@3"},
        {"name": "lora", **text, "base": "echo@3"},
        {"name": "ids", "offset": 1, "max_model_len": 64, "eos_token_ids": [9]},
        {"name": "small", **text, "vocab_size": 300},
        {"name": "rounded", **text, "policy": "near"},
        {"name": "broken", **text, "error_code": "INTERNAL", "error_after": 2},
    ]
    return build_engine(models=models, **options)


def save_tokenizer(folder: Path) -> str:
    """The path of a folder with tokenizer.json, saved with truncation as some models are."""
    tokenizer = type(byte_level()).from_str(byte_level().to_str())
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if check():
            return True
        time.sleep(0.02)
    return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def ids_request(model: str = "echo", ids: tuple[int, ...] = (300, 301), **fields: Any):
    """A request of token ids."""
    return pb.GenerateRequest(model=model, token_ids=pb.TokenIds(ids=ids), **fields)
