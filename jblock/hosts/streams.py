"""Ordered streams of frames between processes of several hosts: gRPC calls over mutual TLS.

A stranger gets as far as the TLS handshake, which has a deadline, and holds one of a bounded number of
connections until then. A peer that does not answer, or takes nothing, for some seconds is gone.
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from jblock.hosts.credentials import Credentials

_MOST_BYTES = 16 * 2**20  # of a frame
_MOST_WAITING = 32  # frames that the other side has not taken
# A peer that takes nothing for so long, or answers no ping, is gone; hosts may be busy.
_PATIENCE_SECONDS = 10.0
_PING_SECONDS = 5.0
_MOST_STREAMS = 64
_OPTIONS = [
    ("grpc.max_receive_message_length", _MOST_BYTES),
    ("grpc.max_send_message_length", _MOST_BYTES),
    ("grpc.keepalive_time_ms", int(1e3 * _PING_SECONDS)),
    ("grpc.keepalive_timeout_ms", int(1e3 * _PATIENCE_SECONDS)),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", int(1e3 * _PATIENCE_SECONDS)),
    ("grpc.max_allowed_incoming_connections", 2 * _MOST_STREAMS),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
]
_CLIENT_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # The one who connects decides when to try again.
    ("grpc.enable_retries", 0),
]


class StreamEnded(ConnectionError):
    """Nothing is sent or received on a stream any more."""


class Stream:
    """One end of a stream. `receive` is called by one thread, the others by any."""

    def __init__(self, end: Callable[[], Any]):
        """A stream without anything that comes in yet; `end` has the other side know."""
        self._incoming: Iterator[bytes] = iter(())
        # Frames, and whether each has one of the places; None is the end.
        self._outgoing: queue.SimpleQueue[tuple[bytes, bool] | None] = queue.SimpleQueue()
        self._places = threading.Semaphore(_MOST_WAITING)
        self._end = end
        self._closed = threading.Event()

    def attach(self, incoming: Iterator[bytes]) -> None:
        """Says where frames come from."""
        self._incoming = incoming

    def outgoing(self) -> Iterator[bytes]:
        """What is sent, until it ends."""
        while (item := self._outgoing.get()) is not None:
            frame, has_place = item
            if has_place:
                self._places.release()
            yield frame

    def send(self, frame: bytes) -> None:
        """Sends a frame; waits while many wait.

        Raises:
          StreamEnded: it has, or nobody takes anything.
        """
        if not self._places.acquire(timeout=_PATIENCE_SECONDS):
            self.close()
        if self._closed.is_set():
            raise StreamEnded("the stream has ended")
        self._outgoing.put((frame, True))

    def send_now(self, frame: bytes) -> None:
        """Sends one of few short frames, which waits for nothing."""
        self._outgoing.put((frame, False))

    def receive(self) -> bytes:
        """The next frame.

        Raises:
          StreamEnded: there is none.
        """
        try:
            return next(self._incoming)
        except StopIteration:
            reason = "the stream has ended"
        except grpc.RpcError as error:
            reason = error.details() if isinstance(error, grpc.Call) else "the connection broke"
        except Exception as error:  # A server's call that was cut off raises no class of its own.
            reason = str(error) or "the connection broke"
        self.close()
        raise StreamEnded(reason)

    def finish(self) -> None:
        """Ends the stream behind what was sent; for the server's side."""
        self._outgoing.put(None)

    def close(self) -> None:
        """Ends the stream at once."""
        self._closed.set()
        self._outgoing.put(None)
        self._places.release()  # Whoever waits to send goes on.
        self._end()


def connect(address: str, service: str, credentials: Credentials) -> Stream:
    """Opens a stream to a service of another host; one that is not there shows at the first `receive`.

    Args:
      address: "host:port".
      service: its name.
      credentials: that it has to believe.
    """
    options = [*_OPTIONS, *_CLIENT_OPTIONS, *credentials.channel_options]
    channel = grpc.secure_channel(address, credentials.of_client(), options=options)
    stream = Stream(channel.close)
    call = channel.stream_stream(f"/{service}/Join")(stream.outgoing())
    stream.attach(call)
    return stream


class StreamServer:
    """Listens for streams."""

    def __init__(
        self,
        listen: str,
        services: Mapping[str, Callable[[Stream], None]],
        credentials: Credentials,
    ):
        """Listens from now on.

        Args:
          listen: "host:port".
          services: by name, what is called for each stream, on a thread of its own; it may use the stream
            until it returns.
          credentials: of this process; others get no stream.

        Raises:
          ValueError: the address cannot be listened on.
        """
        self._streams: set[Stream] = set()
        self._lock = threading.Lock()
        self._server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(_MOST_STREAMS, thread_name_prefix="streams"),
            options=[*_OPTIONS, *_SERVER_OPTIONS],
            maximum_concurrent_rpcs=_MOST_STREAMS,
        )
        for name, service in services.items():
            self._add(name, service)
        try:
            port = self._server.add_secure_port(listen, credentials.of_server())
        except RuntimeError as error:
            raise ValueError(
                f"listen: cannot listen on {listen} ({error}); free it, or give another"
            ) from error
        self.port = port
        self._server.start()

    def _add(self, name: str, service: Callable[[Stream], None]) -> None:
        def join(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            stream = Stream(context.cancel)
            stream.attach(requests)
            if not context.add_callback(stream.close):
                return
            with self._lock:
                self._streams.add(stream)
            threading.Thread(target=run, args=(stream,), name=name, daemon=True).start()
            yield from stream.outgoing()

        def run(stream: Stream) -> None:
            try:
                service(stream)
            finally:
                stream.finish()
                with self._lock:
                    self._streams.discard(stream)

        handler = grpc.stream_stream_rpc_method_handler(join)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"Join": handler}),)
        )

    def close(self) -> None:
        """Ends all streams, and listens no more."""
        stopped = self._server.stop(0)
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        stopped.wait()
