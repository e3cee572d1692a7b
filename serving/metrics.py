"""What a server tells Prometheus: its requests, and the engine's counters and gauges."""

import dataclasses
import ssl
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grpc
import prometheus_client as prom
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jblock.engine import api
from serving import gateway_metrics
from serving.errors import RequestError
from serving.reloading import ReloadedFiles
from serving.tenants import ANONYMOUS, Tenant, Tenants

# What each field of EngineStats is called in a scrape, and whether it only grows.
_HELP = {
    "steps": ("counter", "Forward steps of the engine's loop."),
    "block_calls": ("counter", "Executions of a block, embeddings and heads included."),
    "block_rows": ("counter", "Rows those executions carried, padding not counted."),
    "model_calls": ("counter", "Executions a server of one model each would have needed."),
    "model_rows": ("counter", "Rows those would have carried."),
    "compiles_on_serving_path": ("counter", "Programs compiled while a request waited."),
    "compiles_in_background": ("counter", "Programs compiled at warm-up or in the background."),
    "running": ("gauge", "Sequences in flight."),
    "waiting": ("gauge", "Requests queued in the engine."),
    "pages_free": ("gauge", "Free KV pages over all groups."),
    "pages_total": ("gauge", "KV pages over all groups."),
    "rows_free": ("gauge", "Free register rows."),
    "rows_total": ("gauge", "Register rows."),
    "resident_bytes": ("gauge", "Bytes of parameters and slot tables on the device."),
    "chains": ("gauge", "Models that may be asked for."),
    "chains_resident": ("gauge", "Models that a request would find on the device."),
    "adapters_resident": ("gauge", "Adapters with a slot."),
    "adapter_slots": ("gauge", "Adapters that may have a slot at a time."),
    "host_bytes": ("gauge", "Prepared adapters and parameters in the host's cache."),
    "residency_hits": ("counter", "Requests that found their model on the device."),
    "residency_misses": ("counter", "Requests that had to wait for their model."),
    "host_hits": ("counter", "Loads served from the host's cache."),
    "host_misses": ("counter", "Loads read from the zoo."),
    "loads": ("counter", "Adapters and components brought to the device."),
    "load_failures": ("counter", "Loads that failed."),
    "evictions": ("counter", "Adapters and components that left the device."),
    "prompt_tokens": ("counter", "Prompt tokens computed."),
    "cached_tokens": ("counter", "Prompt tokens found in the prefix cache instead."),
    "preemptions": ("counter", "Sequences that gave their pages to an older one for a while."),
    "kv_offloads": ("counter", "How many of those went by copies of their pages on the host."),
    "host_kv_bytes": ("gauge", "Host memory that copies of pages take."),
    "generated_tokens": ("counter", "Tokens generated."),
    "drafted_tokens": ("counter", "Tokens drafted ahead of the model and verified by it."),
    "accepted_tokens": ("counter", "How many of those came true."),
    "hung_reads": ("counter", "Reads of the zoo that took too long and were given up."),
    "restarts": ("counter", "Engine processes that died or froze and were replaced."),
    "resumed_requests": ("counter", "Requests that went on in a new engine process."),
    "suspects": (
        "gauge",
        "Requests that an engine process died under and that did not go on since.",
    ),
    "kernels_replaced": ("gauge", "Ops whose kernel failed its self-test: XLA's form serves."),
}
# Names that a metric had before: it is told under both.
_BEFORE = {"kv_offloads": ("swaps",)}
# What each field of BlockStats is called.
_OF_BLOCKS = {
    "models": ("gauge", "block_models", "Served models that pass the block."),
    "weight_bytes": ("gauge", "block_weight_bytes", "Parameters of the block."),
    "batches": ("counter", "block_batches", "Batches that the block ran."),
    "rows": ("counter", "block_batch_rows", "Rows of its batches, padding not counted."),
    "seconds": ("counter", "block_seconds", "Device time of its batches, by the profile."),
    "queue_rows": ("gauge", "block_queue_rows", "Rows that the last step left waiting for it."),
    "batch_limit": ("gauge", "block_batch_limit", "Most rows it decodes in a step; 0: no limit."),
    "kv_bytes": ("gauge", "block_kv_bytes", "KV pages of its layers that sequences hold."),
}
# Tenants with series of their own.
_MAX_TENANTS = 1000
# Those that are one number.
_NUMBERS = tuple(
    f.name for f in dataclasses.fields(api.EngineStats) if f.name not in ("tenants", "blocks")
)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
      registry: what a scrape reads.
      requests: ended requests by model ("" when unknown) and status code.
      time_to_first_token: seconds from a request's arrival to its first token, by model.
      request_time: seconds from a request's arrival to its end, by model.
      refused: calls without the key of a tenant; they count nowhere else.
      tokens: prompt and completion tokens of requests that succeeded, by model and kind.
      tenant_requests: ended requests by tenant and status code.
      tenant_tokens: prompt and completion tokens of requests that succeeded, by tenant and kind.
    """

    def __init__(
        self,
        stats: Callable[[], api.EngineStats],
        num_open: Callable[[], int],
        up: Callable,
        names: str = "jblock",
        agents: Callable[[], Sequence[api.AgentStatus]] = tuple,
        adapters: Callable[[], tuple[set[str], set[str]]] = lambda: (set(), set()),
    ):
        """Reads the engine's `stats` and its `agents`, the open requests, whether it is `up`, and which
        `adapters` run and wait, at each scrape. `names` is one of gateway_metrics.PREFIXES: how that is
        called which vLLM measures too."""
        self.registry = prom.CollectorRegistry()
        prefix = gateway_metrics.PREFIXES[names]
        self.requests = prom.Counter(
            "jblock_requests", "Ended requests.", ["model", "code"], registry=self.registry
        )
        self.time_to_first_token = self._histogram(
            f"{prefix}time_to_first_token", "Seconds from arrival to the first token."
        )
        request_time = "e2e_request_latency" if names == "vllm" else "request_time"
        self.request_time = self._histogram(
            prefix + request_time, "Seconds from arrival to the end."
        )
        self.tokens = prom.Counter(
            "jblock_tokens",
            "Tokens of requests that succeeded.",
            ["model", "kind"],
            registry=self.registry,
        )
        self.tenant_requests = prom.Counter(
            "jblock_tenant_requests",
            "Ended requests of a tenant.",
            ["tenant", "code"],
            registry=self.registry,
        )
        self.tenant_tokens = prom.Counter(
            "jblock_tenant_tokens",
            "Tokens of a tenant's requests that succeeded.",
            ["tenant", "kind"],
            registry=self.registry,
        )
        self._tenants: set[str] = set()
        self.refused = prom.Counter(
            "jblock_unauthenticated", "Calls without a tenant's key.", registry=self.registry
        )
        self._gauge("requests_open", "Requests admitted and not yet over.", num_open)
        self._gauge("engine_up", "1 while the engine serves.", up)
        self.registry.register(_EngineCollector(stats, agents))
        collector = gateway_metrics.GatewayCollector(prefix, stats, adapters)
        self.registry.register(collector)

    def watch(self, files: Sequence[ReloadedFiles]) -> None:
        """Reads at each scrape how often files were read again."""
        self.registry.register(_FilesCollector(files))

    def ended(
        self, model: str, code: grpc.StatusCode, seconds: float, tenant: Tenant = ANONYMOUS
    ) -> None:
        """Counts a request that is over."""
        self.requests.labels(model, code.name).inc()
        self.request_time.labels(model).observe(seconds)
        self.tenant_requests.labels(self._label(tenant), code.name).inc()

    def used(self, tenant: Tenant, prompt: int, completion: int) -> None:
        """Counts the tokens of a request that succeeded."""
        label = self._label(tenant)
        self.tenant_tokens.labels(label, "prompt").inc(prompt)
        self.tenant_tokens.labels(label, "completion").inc(completion)

    def _label(self, tenant: Tenant) -> str:
        """A tenant's name; the first so many have labels of their own, and the others one together."""
        if tenant.name not in self._tenants and len(self._tenants) >= _MAX_TENANTS:
            return "other"
        self._tenants.add(tenant.name)
        return tenant.name

    def serve(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        tenants: Tenants | None = None,
    ) -> tuple[int, Callable[[], None]]:
        """Answers scrapes over HTTP in a thread.

        Args:
          host: address to listen on.
          port: 0 picks one.
          tls: the server's certificate; None: nothing is encrypted.
          tenants: whose admins' keys are asked for; None: nobody's.

        Returns:
          The port, and a function that ends it.

        Raises:
          OSError: the port is taken.
        """
        # Nobody is answered before it is known who may ask.
        registry = prom.CollectorRegistry() if tenants is not None else self.registry
        server, thread = prom.start_http_server(port, addr=host, registry=registry)
        if tenants is not None:
            server.set_app(_guarded(prom.make_wsgi_app(self.registry), tenants))
        if tls is not None:
            # The handshake is the handler's: one that hangs must not hold up the others.
            server.socket = tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop

    def _histogram(self, name: str, text: str) -> prom.Histogram:
        return prom.Histogram(
            f"{name}_seconds", text, ["model"], buckets=_SECONDS, registry=self.registry
        )

    def _gauge(self, name: str, text: str, function: Callable) -> None:
        prom.Gauge(f"jblock_{name}", text, registry=self.registry).set_function(function)


def _guarded(app: Any, tenants: Tenants) -> Any:
    """A WSGI application for admins only."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        given = [("authorization", v) for k, v in environ.items() if k == "HTTP_AUTHORIZATION"]
        status = "403 Forbidden"
        try:
            if tenants.find(given).admin:
                return app(environ, start_response)
        except RequestError:
            status = "401 Unauthorized"
        start_response(status, [("www-authenticate", "Bearer"), ("content-length", "0")])
        return [b""]

    return answer


class _FilesCollector(Collector):
    """Files that are read again when they change."""

    def __init__(self, files: Sequence[ReloadedFiles]):
        self._files = files

    def collect(self) -> Iterable[Metric]:
        text = "Files that changed while the server ran, taken or refused."
        family = CounterMetricFamily("jblock_file_reloads", text, labels=["file", "outcome"])
        for one in self._files:
            family.add_metric([one.field, "taken"], one.reloads)
            family.add_metric([one.field, "refused"], one.refusals)
        yield family


class _EngineCollector(Collector):
    """EngineStats, read when scraped: of the engine, and of each agent where there are several."""

    def __init__(
        self,
        stats: Callable[[], api.EngineStats],
        agents: Callable[[], Sequence[api.AgentStatus]],
    ):
        self._stats, self._agents = stats, agents

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield from _of_tenants(stats.tenants)
        for name in _NUMBERS:
            family, text = _family(name)
            for called in (name, *_BEFORE.get(name, ())):
                yield family(f"jblock_{called}", text, value=getattr(stats, name))
        yield from _of_blocks(stats.blocks)
        agents = self._agents()
        if not agents:
            return
        up = GaugeMetricFamily("jblock_agent_up", "1 while the agent serves.", labels=["agent"])
        requests = GaugeMetricFamily(
            "jblock_agent_requests", "Open requests that the agent has.", labels=["agent"]
        )
        for agent in agents:
            up.add_metric([agent.name], int(agent.up))
            requests.add_metric([agent.name], agent.requests)
        yield from (up, requests)
        for name in _NUMBERS:
            family, text = _family(name)
            metric = family(f"jblock_agent_{name}", text, labels=["agent"])
            for agent in agents:
                metric.add_metric([agent.name], getattr(agent.stats, name))
            yield metric


def _family(name: str) -> tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str]:
    """How a field of EngineStats is told."""
    kind, text = _HELP.get(name, ("gauge", name))
    return CounterMetricFamily if kind == "counter" else GaugeMetricFamily, text


def _of_tenants(tenants: Sequence[api.TenantStats]) -> Iterable[Metric]:
    """What each tenant has of the engine, the most served first where they are many."""
    waiting = GaugeMetricFamily(
        "jblock_tenant_waiting", "Requests of a tenant queued in the engine.", labels=["tenant"]
    )
    running = GaugeMetricFamily(
        "jblock_tenant_running", "Sequences of a tenant in flight.", labels=["tenant"]
    )
    served = CounterMetricFamily(
        "jblock_tenant_served_seconds",
        "Device time that a tenant was charged for, by the profile.",
        labels=["tenant"],
    )
    for one in sorted(tenants, key=lambda t: -t.served_seconds)[:_MAX_TENANTS]:
        waiting.add_metric([one.tenant], one.waiting)
        running.add_metric([one.tenant], one.running)
        served.add_metric([one.tenant], one.served_seconds)
    yield from (waiting, running, served)


def _of_blocks(blocks: Sequence[api.BlockStats]) -> Iterable[Metric]:
    """What each block does; the engine tells the busiest, and the others as one."""
    for field, (kind, name, text) in _OF_BLOCKS.items():
        family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        metric = family(f"jblock_{name}", text, labels=["block", "kind"])
        for block in blocks:
            metric.add_metric([block.block, block.kind], getattr(block, field))
        yield metric
