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
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, Protocol

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


class Sender(Protocol):
    """What takes frames for who asks."""

    def send(self, frame: wire.ToParent) -> None:
        """Sends one frame.

        Raises:
          OSError: nobody is there any more.
        """
        ...


class _Sender(Sender):
    """Writes to the parent, from several threads."""

    def __init__(self, connection: Connection):
        self.last = time.monotonic()
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, frame: wire.ToParent) -> None:
        """Sends one frame.

        Raises:
          OSError: the parent is gone.
        """
        data = wire.pack(frame)
        with self._lock:
            self._connection.send_bytes(data)
            self.last = time.monotonic()


class _Inbox(threading.Thread):
    """Reads the parent's messages; those that come before the engine is there wait for it."""

    def __init__(self, connection: Connection, sender: _Sender):
        super().__init__(name="engine-inbox", daemon=True)
        self.closing = threading.Event()
        self.warm = False
        self._connection, self._sender = connection, sender
        self._lock = threading.Lock()
        self._engine: api.Engine | None = None
        self._early: list[wire.ToChild] = []

    def attach(self, engine: api.Engine) -> None:
        """Hands the engine what came so far, and from now on everything at once."""
        with self._lock:
            self._engine = engine
            for frame in self._early:
                self._pass_on(engine, frame)

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
                frame = wire.for_child(self._connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(0)
            if isinstance(frame, wire.Close):
                if not self.warm:
                    os._exit(0)  # A compilation cannot be interrupted otherwise.
                self.closing.set()
                continue
            with self._lock:
                if self._engine is None:
                    self._early.append(frame)
                else:
                    self._pass_on(self._engine, frame)

    def _pass_on(self, engine: api.Engine, frame: wire.ToChild) -> None:
        if isinstance(frame, wire.Submit):
            engine.submit(frame.request)
        elif isinstance(frame, wire.Cancel):
            engine.cancel(frame.request_id)
        elif isinstance(frame, wire.Serve):
            # It may take a minute, and requests go on meanwhile.
            threading.Thread(
                target=change, args=(self._sender, engine, frame), name="engine-serve", daemon=True
            ).start()


_answering = threading.Lock()


def change(sender: Sender, engine: api.Engine, frame: wire.Serve) -> None:
    """Serves other chains and answers with them, or with the error."""
    try:
        engine.serve(frame.models, frame.base)
        with _answering:  # Answers in the order of what they say.
            sender.send(wire.Served(frame.number, tuple(engine.models())))
        return
    except (api.EngineDied, OSError):
        return  # The loop's own report follows, or nobody is left to hear.
    except Exception as error:
        kind = next((k for k, cls in wire.ERRORS.items() if isinstance(error, cls)), "other")
        if kind == "other":
            traceback.print_exc()
        message = str(error) or type(error).__name__
        answer = wire.Served(frame.number, refused=kind, message=message)
    with contextlib.suppress(OSError):
        sender.send(answer)


class _Heart(threading.Thread):
    """Sends a beat whenever the parent has heard nothing for a quarter of the silence it allows.

    Attributes:
      rounds: of the main thread, once the engine is warm. Where they stop, so do the beats.
    """

    def __init__(self, sender: _Sender, inbox: _Inbox, seconds: float):
        super().__init__(name="engine-heart", daemon=True)
        self.rounds = 0
        self._sender, self._inbox, self._seconds = sender, inbox, seconds

    def run(self) -> None:
        """Beats until the process ends."""
        seen = -1
        interval = self._seconds / 4
        while True:
            time.sleep(interval / 2)
            if time.monotonic() - self._sender.last < interval:
                continue
            if self._inbox.warm and seen == self.rounds:
                continue
            seen = self.rounds
            with contextlib.suppress(OSError):
                self._sender.send(wire.Beat())


def _serve(sender: _Sender, inbox: _Inbox, heart: _Heart, engine: api.Engine) -> None:
    """Passes what the engine brings to the parent until told to close."""
    models = engine.models()
    inbox.warm = True
    # Counters first: whoever has seen the engine warm must not read those of one that is not.
    sent = engine.stats()
    sender.send(wire.Step((), wire.pack_stats(sent)))
    sender.send(wire.Models(tuple(models)))
    while not inbox.closing.is_set():
        outputs = engine.poll(_POLL_SECONDS)
        stats = engine.stats()
        if outputs or stats != sent:
            news = b"" if stats == sent else wire.pack_stats(stats)
            sender.send(wire.Step(tuple(outputs), news))
            sent = stats
        heart.rounds += 1


def main(fd: int) -> int:
    """Runs the child; returns its exit code."""
    # The parent decides when to stop: a signal to the whole group must not cut its drain short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(fd)
    start = wire.for_child(connection.recv_bytes())
    if not isinstance(start, wire.Start):
        raise ValueError(f"the first frame is {type(start).__name__}, not Start")
    # Before anything is imported that starts threads or looks for devices.
    os.environ.update(start.environment)
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    sender = _Sender(connection)
    inbox = _Inbox(connection, sender)
    inbox.start()
    heart = _Heart(sender, inbox, start.heartbeat)
    if start.heartbeat:
        heart.start()
    built = False
    try:
        engine = load_factory(start.factory)(**start.kwargs)
        built = True
        engine.report_running(lambda begun, ended: sender.send(wire.Running(begun, ended)))
        inbox.attach(engine)
        _serve(sender, inbox, heart, engine)
        engine.close()
    except BrokenPipeError:
        return 0
    except ValueError as error:
        if built:
            traceback.print_exc()
        sender.send(wire.Died(str(error)) if built else wire.Invalid(str(error)))
        return 1
    except api.EngineDied as error:
        sender.send(wire.Died(str(error)))
        return 1
    except Exception as error:
        traceback.print_exc()
        sender.send(wire.Died(f"{type(error).__name__}: {error}"))
        return 1
    return 0


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    sys.stdout.flush()
    # Background threads of an engine that failed must not keep its process, and its memory, alive.
    os._exit(code)
