"""A gRPC server around an engine: its life from the first connection to the last.

It imports no jax: the engine is elsewhere, behind `jblock.engine.api`.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import grpc
from absl import logging
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jblock.engine import api
from serving import addresses
from serving.authentication import Authentication, PeerAuthentication
from serving.changes import Changes
from serving.chat.renderer import Renderer
from serving.dispatcher import Dispatcher
from serving.errors import DecodeErrors
from serving.generation import Generator
from serving.health import Health
from serving.http.app import make_app
from serving.http.calls import Calls
from serving.http.listener import Listener
from serving.metrics import Metrics
from serving.models_service import Models
from serving.open_inference.messages import handlers
from serving.open_inference.service import OpenInference
from serving.reloading import keep_fresh
from serving.request_log import RequestLog
from serving.service import Inference
from serving.structured.grammars import Grammars
from serving.tenants import EVERYBODY, Tenants
from serving.tls import Certificates
from serving.v1 import jblock_pb2, jblock_pb2_grpc

_SERVICES = tuple(s.full_name for s in jblock_pb2.DESCRIPTOR.services_by_name.values())
# Seconds that calls which were cut get to say so, and that all get at the very end to send what they have;
# health watchers never end alone. What is left then ends as CANCELLED, which says nothing.
_CUT_SECONDS = 3.0
_LAST_WORDS_SECONDS = 1.0
# Calls that arrived and whose handler has not begun: past them grpc answers CANCELLED, which says nothing. So
# many at once that admission, which says what to do, refuses them first.
_MAX_PENDING_CALLS = 50_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server meets its clients.

    Attributes:
      host: address to listen on: a name, a number of IPv4 or IPv6, or "unix:PATH".
      port: 0 picks a free one.
      http_port: where the OpenAI-compatible API listens, on the same host; None: nowhere; 0 picks a free one.
      max_queue: most requests open at once; more are refused.
      metrics_host: address for Prometheus.
      metrics_names: "vllm" calls what vLLM measures too as vLLM does.
      metrics_port: None: no metrics; 0 picks a free one.
      drain_seconds: how long open requests may go on after the server is told to stop.
      tenants: who may call; everybody when it is empty.
      tls: certificates of every port; None: nothing is encrypted.
      mtls_port: where gRPC listens for clients with certificates; None: nowhere; 0 picks a free one.
      http_mtls_port: the same of the HTTP API.
      metrics_auth: Prometheus needs the key of an admin.
      open_health: health checks need no key.
      request_log: file that gets a line for each request that is over; "-": standard error; "": none.
    """

    host: str = "127.0.0.1"
    port: int = 0
    http_port: int | None = None
    max_queue: int = 256
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    metrics_names: str = "jblock"
    drain_seconds: float = 30.0
    tenants: Tenants = EVERYBODY
    open_health: bool = False
    tls: Certificates | None = None
    mtls_port: int | None = None
    http_mtls_port: int | None = None
    metrics_auth: bool = False
    request_log: str = ""

    def __post_init__(self):
        for name in ("port", "http_port", "metrics_port", "mtls_port", "http_mtls_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise ValueError(f"{name}: {port} is no port; give 0 (any) to 65535")
            if "mtls" in name and port is not None and not (self.tls and self.tls.asks_clients):
                raise ValueError(
                    f"{name}: needs tls_cert_file, tls_key_file and tls_client_ca_file"
                )
        if self.metrics_auth and not self.tenants.required:
            raise ValueError("metrics_auth: needs auth_file; without tenants there is no key")
        addresses.check_host("host", self.host)
        ports = {"http_port": self.http_port, "mtls_port": self.mtls_port}
        ports["http_mtls_port"] = self.http_mtls_port
        numbered = next((name for name, port in ports.items() if port is not None), None)
        if numbered is not None and addresses.is_unix(self.host):
            raise ValueError(
                f"{numbered}: a unix socket has no port; give a host that has, or leave it out"
            )
        if self.metrics_port is not None:
            if addresses.is_unix(self.metrics_host):
                raise ValueError("metrics_host: metrics have no unix socket; give 127.0.0.1 or ::1")
            addresses.check_host("metrics_host", self.metrics_host)
        if self.max_queue < 1:
            raise ValueError(f"max_queue: {self.max_queue} admits nothing; give at least 1")
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds: {self.drain_seconds} is below 0; give 0 or more")


class Server:
    """One listening server. Made and used within one event loop.

    Attributes:
      port: where it listens, once started; 0 for a unix socket.
      http_port: where the OpenAI-compatible API listens, once started; None without it.
      mtls_port: where gRPC listens for clients with certificates, once started; None without it.
      http_mtls_port: the same of the HTTP API.
      metrics_port: where Prometheus may ask, once started; None without metrics.
    """

    def __init__(self, config: ServerConfig, engine: api.Engine):
        """Takes the engine over: `stop` closes it."""
        self.config = config
        self.port = 0
        self.http_port: int | None = None
        self.mtls_port: int | None = None
        self.http_mtls_port: int | None = None
        self.metrics_port: int | None = None
        self._dispatcher = Dispatcher(engine, config.max_queue)
        self._changes = Changes(self._dispatcher)
        self._metrics = Metrics(
            engine.stats,
            lambda: self._dispatcher.num_open,
            lambda: int(self.is_serving),
            config.metrics_names,
            engine.agents,
            self._dispatcher.adapters,
        )
        self._stop_metrics: Callable[[], None] = lambda: None
        self._renderer = Renderer()
        self._grammars = Grammars()
        self._request_log = RequestLog(config.request_log) if config.request_log else None
        self._generator = Generator(
            self._dispatcher,
            self._changes,
            self._renderer,
            self._grammars,
            self._metrics,
            self._request_log,
        )
        self._health = Health(_SERVICES)
        refused = self._metrics.refused.inc
        self._server = _grpc_server(Authentication(config.tenants, config.open_health, refused))
        self._mutual_server: grpc.aio.Server | None = None
        if config.mtls_port is not None:
            self._mutual_server = _grpc_server(PeerAuthentication(config.tenants, refused))
        calls = Calls(self._dispatcher, self._generator, config.tenants, self._metrics)
        app = make_app(calls, self._renderer, self._changes, config.open_health)
        self._http = self._listener(app, config.http_port, mutual=False)
        self._http_mutual = self._listener(app, config.http_mtls_port, mutual=True)
        files = (config.tenants.files, config.tls.files if config.tls else None)
        self._files = [one for one in files if one is not None]
        self._metrics.watch(self._files)
        self._watchers: list[asyncio.Task] = []

    @property
    def is_serving(self) -> bool:
        """Whether the engine is warm and alive, and not just being replaced."""
        return self._dispatcher.up

    @property
    def models(self) -> tuple[api.ModelInfo, ...]:
        """What is served."""
        return tuple(model.info for model in self._dispatcher.models.values())

    async def start(self) -> None:
        """Listens; requests are answered UNAVAILABLE, and health NOT_SERVING, until `warm`.

        Raises:
          OSError: a port is taken.
        """
        self._add_services(self._server)
        self.port = self._bind(self._server, self.config.port, mutual=False)
        if self._mutual_server is not None:
            self._add_services(self._mutual_server)
            self.mtls_port = self._bind(
                self._mutual_server, self.config.mtls_port or 0, mutual=True
            )
        if self.config.metrics_port is not None:
            config = self.config
            tls = config.tls.http_context(mutual=False) if config.tls else None
            self.metrics_port, self._stop_metrics = self._metrics.serve(
                config.metrics_host,
                self.config.metrics_port,
                tls,
                config.tenants if config.metrics_auth else None,
            )
        await self._server.start()
        if self._mutual_server is not None:
            await self._mutual_server.start()
        if self._http is not None:
            await self._http.start()
            self.http_port = self._http.port
        if self._http_mutual is not None:
            await self._http_mutual.start()
            self.http_mtls_port = self._http_mutual.port
        self._dispatcher.start()
        self._watchers = [
            asyncio.create_task(self._watch()),
            asyncio.create_task(keep_fresh(self._files)),
        ]

    async def warm(self) -> None:
        """Waits until the engine serves.

        Raises:
          ValueError: the engine refused its configuration.
          EngineDied: it ended before it was warm.
        """
        events = (self._dispatcher.ready, self._dispatcher.dead)
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._dispatcher.failure is not None:
            raise self._dispatcher.failure
        self._health.set(True)

    async def failed(self) -> Exception:
        """Waits until the engine is gone for good; why it is."""
        await self._dispatcher.dead.wait()
        assert self._dispatcher.failure is not None
        return self._dispatcher.failure

    async def stop(self, hurry: asyncio.Event | None = None) -> bool:
        """Admits no more, lets open requests end, then closes everything.

        Args:
          hurry: ends the waiting for open requests early when it is set.

        Returns:
          Whether all open requests ended within `drain_seconds`.
        """
        for watcher in self._watchers:
            watcher.cancel()
        self._health.set(False)
        cut = await self._dispatcher.drain(self.config.drain_seconds, hurry)
        if cut:
            logging.warning(
                "shutting down: %d requests were not over %s, and were cut off",
                cut,
                "when it was to hurry"
                if hurry is not None and hurry.is_set()
                else f"after drain_seconds, {self.config.drain_seconds:g}, or not read",
            )
            self._dispatcher.cut()
            await self._dispatcher.left(_CUT_SECONDS)
        servers = [s for s in (self._server, self._mutual_server) if s is not None]
        listeners = [one for one in (self._http, self._http_mutual) if one is not None]
        await asyncio.gather(
            *(server.stop(_LAST_WORDS_SECONDS) for server in servers),
            *(one.stop() for one in listeners),
        )
        await self._renderer.close()
        await self._grammars.close()
        self._dispatcher.close()
        self._stop_metrics()
        if self._request_log is not None:
            self._request_log.close()
        return not cut

    def _listener(self, app: Any, port: int | None, *, mutual: bool) -> Listener | None:
        """Of the HTTP API, on a port of its own."""
        if port is None:
            return None
        tls = self.config.tls.http_context(mutual) if self.config.tls else None
        return Listener(app, self.config.host, port, _LAST_WORDS_SECONDS, tls)

    def _add_services(self, server: grpc.aio.Server) -> None:
        inference = Inference(self._dispatcher, self._generator)
        jblock_pb2_grpc.add_InferenceServicer_to_server(inference, server)
        models = Models(self._dispatcher, self._changes)
        jblock_pb2_grpc.add_ModelsServicer_to_server(models, server)
        open_inference = OpenInference(self._dispatcher, self._generator)
        server.add_generic_rpc_handlers((handlers(open_inference),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )

    def _bind(self, server: grpc.aio.Server, port: int, *, mutual: bool) -> int:
        """Has a server listen; where, 0 for a unix socket.

        Raises:
          OSError: it cannot.
        """
        host, tls = self.config.host, self.config.tls
        where = addresses.address(host, port)
        try:
            if tls is None:
                bound = server.add_insecure_port(where)
            else:
                bound = server.add_secure_port(where, tls.grpc_credentials(mutual))
        except RuntimeError as error:
            raise OSError(addresses.why_not(host, port)) from error
        return 0 if addresses.is_unix(host) else bound

    async def _watch(self) -> None:
        """Keeps health true to the engine."""
        dispatcher = self._dispatcher
        while not dispatcher.dead.is_set():
            await dispatcher.changed.wait()
            dispatcher.changed.clear()
            self._health.set(dispatcher.up)
        logging.error("the engine is gone: %s", dispatcher.failure)


def _grpc_server(authentication: grpc.aio.ServerInterceptor) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=(authentication, DecodeErrors()),
        # Two servers on one port would share its clients at random.
        options=(
            ("grpc.so_reuseport", 0),
            ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING_CALLS),
        ),
    )


async def serve(
    config: ServerConfig,
    engine: api.Engine,
    stop: asyncio.Event,
    on_ready: Callable[[Server], None] = lambda server: None,
    hurry: asyncio.Event | None = None,
) -> bool:
    """Serves until `stop` is set or the engine is gone for good, then drains and closes the engine.

    Args:
      config: how to serve.
      engine: what to serve; closed at the end, whatever happens.
      stop: ends it.
      on_ready: called once requests are answered.
      hurry: cuts short what `stop` began.

    Returns:
      Whether all open requests ended in time.

    Raises:
      OSError: a port is taken.
      ValueError: the engine refused its configuration.
      EngineDied: the engine ended before it was warm, or later, and could not be replaced.
    """
    server = Server(config, engine)
    try:
        await server.start()
        stopped = asyncio.create_task(stop.wait())
        warm = asyncio.create_task(server.warm())
        failed = asyncio.create_task(server.failed())
        await asyncio.wait((stopped, warm), return_when=asyncio.FIRST_COMPLETED)
        if warm.done():
            warm.result()
            on_ready(server)
        else:
            warm.cancel()
        await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
        if failed.done():
            raise failed.result()
        failed.cancel()
    finally:
        drained = await server.stop(hurry)
    return drained
