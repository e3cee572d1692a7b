"""The child's side of `jblock.engine.process.client`: builds an engine and passes messages on.

Started as `python -m jblock.engine.process.server FD`, where FD is one end of a pipe. The first frame
names the factory. The child ends when told to, when its engine dies, or when the pipe closes
because the parent is gone: an engine without a server would hold a device for nobody.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from jblock.engine import api
from jblock.engine.process import wire

# Seconds between looks at a quiet engine: how late gauges and a close may be noticed.
_POLL_SECONDS = 0.05


def load_factory(name: str) -> Any:
    """The function a "module:function" string names.

    Raises:
      ValueError: there is no such function.
    """
    module_name, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"factory: {name!r} cannot be loaded ({error}); "
            "give 'module:function' of an importable module"
        ) from error


class _Sender:
    """Writes to the parent, from several threads."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, body: Any) -> None:
        """Sends one frame.

        Raises:
          OSError: the parent is gone.
        """
        frame = wire.pack(kind, body)
        with self._lock:
            self._connection.send_bytes(frame)


class _Inbox(threading.Thread):
    """Reads the parent's messages; those that come before the engine is there wait for it."""

    def __init__(self, connection: Connection, sender: _Sender):
        super().__init__(name="engine-inbox", daemon=True)
        self.closing = threading.Event()
        self.warm = False
        self._connection, self._sender = connection, sender
        self._lock = threading.Lock()
        self._engine: api.Engine | None = None
        self._early: list[tuple[str, Any]] = []

    def attach(self, engine: api.Engine) -> None:
        """Hands the engine what came so far, and from now on everything at once."""
        with self._lock:
            self._engine = engine
            for kind, body in self._early:
                self._pass_on(engine, kind, body)

    def run(self) -> None:
        """Reads until told to close. An engine that hears nothing any more must not live on."""
        try:
            self._read()
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _read(self) -> None:
        while True:
            try:
                kind, body = wire.unpack(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            if kind == "close":
                if not self.warm:
                    os._exit(0)  # A compilation cannot be interrupted otherwise.
                self.closing.set()
                continue
            with self._lock:
                if self._engine is None:
                    self._early.append((kind, body))
                else:
                    self._pass_on(self._engine, kind, body)

    def _pass_on(self, engine: api.Engine, kind: str, body: Any) -> None:
        if kind == "submit":
            engine.submit(wire.from_plain(api.Request, body))
        elif kind == "cancel":
            engine.cancel(body)
        elif kind == "serve":
            # It may take a minute, and requests go on meanwhile.
            threading.Thread(
                target=_change, args=(self._sender, engine, *body), name="engine-serve", daemon=True
            ).start()
        else:
            raise ValueError(f"kind: {kind!r} is unknown; both ends must run the same jblock")


def _change(sender: _Sender, engine: api.Engine, number: int, models: list[str]) -> None:
    """Serves other chains and answers with them, or with the error."""
    answer: list[Any]
    try:
        answer = [number, "", [wire.to_plain(m) for m in engine.serve(models)]]
    except api.EngineDied:
        return  # The loop's own report follows.
    except Exception as error:
        kind = next((k for k, cls in wire.ERRORS.items() if isinstance(error, cls)), "other")
        if kind == "other":
            traceback.print_exc()
        answer = [number, kind, str(error) or type(error).__name__]
    with contextlib.suppress(OSError):
        sender.send("served", answer)


def _serve(sender: _Sender, inbox: _Inbox, engine: api.Engine) -> None:
    """Passes what the engine brings to the parent until told to close."""
    models = engine.models()
    inbox.warm = True
    # Counters first: whoever has seen the engine warm must not read those of one that is not.
    sent = engine.stats()
    sender.send("step", [[], wire.to_plain(sent)])
    sender.send("models", [wire.to_plain(m) for m in models])
    while not inbox.closing.is_set():
        outputs = engine.poll(_POLL_SECONDS)
        stats = engine.stats()
        if outputs or stats != sent:
            body = [[wire.to_plain(o) for o in outputs], wire.to_plain(stats)]
            sender.send("step", body)
            sent = stats


def main(fd: int) -> int:
    """Runs the child; returns its exit code."""
    # The parent decides when to stop: a signal to the whole group must not cut its drain short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(fd)
    _, start = wire.unpack(connection.recv_bytes())
    sender = _Sender(connection)
    inbox = _Inbox(connection, sender)
    inbox.start()
    built = False
    try:
        engine = load_factory(start["factory"])(**start["kwargs"])
        built = True
        inbox.attach(engine)
        _serve(sender, inbox, engine)
        engine.close()
    except BrokenPipeError:
        return 0
    except ValueError as error:
        if built:
            traceback.print_exc()
        sender.send("died" if built else "invalid", str(error))
        return 1
    except api.EngineDied as error:
        sender.send("died", str(error))
        return 1
    except Exception as error:
        traceback.print_exc()
        sender.send("died", f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    sys.stdout.flush()
    # Background threads of an engine that failed must not keep its process, and its memory, alive.
    os._exit(code)
