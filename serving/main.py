"""`jblock-serve`: serves the models of a zoo over gRPC; or is only the engine of front ends, or only one."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from jblock.engine import api
from jblock.engine.process.server import load_factory
from jblock.engine.process.shared import SharedEngine, drained, remote_engine
from jblock.engine.process.supervisor import SupervisedEngine
from jblock.scheduler.adaptive import AdaptiveEngine, exact_models, with_variants
from jblock.scheduler.itinerary import Budget
from jblock.zoo.records import POLICIES
from jblock.zoo.store import Zoo
from serving import addresses, agent_flags, config_file, engine_processes
from serving.engine_flags import engine_kwargs
from serving.server import Server, ServerConfig, serve
from serving.tenants import EVERYBODY
from serving.tenants_file import TenantsFile
from serving.tls import Certificates

# What supervisors and terminals send: stop, Ctrl-C, Ctrl-\\, and that the terminal was closed.
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)

_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "Address to listen on: of IPv4, IPv6, a name, or unix:PATH."
)
_PORT = flags.DEFINE_integer("port", 8470, "Port to listen on; 0 picks a free one.")
_HTTP_PORT = flags.DEFINE_integer(
    "http_port", None, "Port of the OpenAI-compatible HTTP API; 0 picks a free one; default: none."
)
_PORT_FILE = flags.DEFINE_string("port_file", None, "Where to write the port, once ready.")
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 256, "Most requests open at once.")
_METRICS_HOST = flags.DEFINE_string("metrics_host", "127.0.0.1", "Address for Prometheus.")
_METRICS_PORT = flags.DEFINE_integer(
    "metrics_port", None, "Port for Prometheus; 0 picks a free one; default: no metrics."
)
_DRAIN_SECONDS = flags.DEFINE_float(
    "drain_seconds", 30.0, "How long open requests may go on after SIGTERM or Ctrl-C."
)
_AUTH_FILE = flags.DEFINE_string(
    "auth_file", None, "Tenants and digests of their keys, .json or .toml; default: no keys."
)
_TLS_CERT_FILE = flags.DEFINE_string(
    "tls_cert_file", None, "Certificate of every port, PEM; default: nothing is encrypted."
)
_TLS_KEY_FILE = flags.DEFINE_string("tls_key_file", None, "Its private key, PEM.")
_TLS_CLIENT_CA_FILE = flags.DEFINE_string(
    "tls_client_ca_file", None, "Authorities of clients' certificates, PEM, for the mTLS ports."
)
_MTLS_PORT = flags.DEFINE_integer(
    "mtls_port", None, "Port of gRPC for clients with certificates; default: none."
)
_HTTP_MTLS_PORT = flags.DEFINE_integer(
    "http_mtls_port", None, "Port of HTTP for clients with certificates; default: none."
)
_METRICS_AUTH = flags.DEFINE_bool("metrics_auth", False, "Ask Prometheus for the key of an admin.")
_OPEN_HEALTH = flags.DEFINE_bool(
    "open_health", False, "Answer health checks without a key, for probes that can send none."
)
_REQUEST_LOG = flags.DEFINE_string(
    "request_log",
    "",
    "File that gets a line of JSON for each request that is over, without its text; - is standard error.",
)
_ENGINE = flags.DEFINE_enum(
    "engine", "process", ["process", "thread"], "Where the engine's loop runs."
)
_SHARE_ENGINE = flags.DEFINE_string(
    "share_engine",
    None,
    "Path of a Unix socket at which the engine is shared out to front ends, and nothing else is served.",
)
_ENGINE_ADDRESS = flags.DEFINE_string(
    "engine_address",
    None,
    "Path of the socket of a shared engine that this server is a front end of; no zoo then.",
)
_HEARTBEAT = flags.DEFINE_float(
    "heartbeat_seconds",
    10.0,
    "An engine process that is silent for longer is frozen, and is replaced; 0: never.",
    lower_bound=0.0,
)
_ADAPTIVE = flags.DEFINE_enum(
    "adaptive",
    "exact",
    list(POLICIES),
    "What may stand for a model's own blocks where a request accepts it: edges of the zoo up to this policy.",
)
_ADAPTIVE_MEASURE = flags.DEFINE_enum(
    "adaptive_measure",
    "kl",
    ["kl", "accuracy_change"],
    "The measure of edges that says what they do to answers.",
)
_ADAPTIVE_DAMAGE = flags.DEFINE_float(
    "adaptive_damage", 0.0, "The most of it that one request is given.", lower_bound=0.0
)
_METRICS_NAMES = flags.DEFINE_enum(
    "metrics_names",
    "jblock",
    ["jblock", "vllm"],
    "Prefix of the metrics that vLLM has too: jblock_, or vllm: for tools that know no other.",
)
_CONFIG = flags.DEFINE_string(
    "config", None, "TOML file of these flags by their names; flags given here override it."
)
_PROFILER_PORT = flags.DEFINE_integer(
    "profiler_port",
    None,
    "Port of the engine's XLA profiler server; default: none.",
    lower_bound=1,
    upper_bound=65535,
)


def _certificates() -> Certificates | None:
    cert_file, key_file = _TLS_CERT_FILE.value, _TLS_KEY_FILE.value
    if not cert_file and not key_file:
        if _TLS_CLIENT_CA_FILE.value:
            raise ValueError("tls_client_ca_file: needs tls_cert_file and tls_key_file")
        return None
    if not cert_file or not key_file:
        raise ValueError("tls_cert_file: and tls_key_file belong together; give both")
    return Certificates(cert_file, key_file, _TLS_CLIENT_CA_FILE.value)


def _announce(server: Server) -> None:
    # What is there now stays; the collector need not walk over it while tokens come.
    gc.collect()
    gc.freeze()
    count = len(server.models)
    models = f"{count} model" + "s" * (count != 1)
    http = f", HTTP on port {server.http_port}" if server.http_port else ""
    metrics = f", metrics on port {server.metrics_port}" if server.metrics_port else ""
    if _PORT_FILE.value:
        # Aside and renamed: who waits for the file never reads half a number.
        aside = f"{_PORT_FILE.value}.{os.getpid()}"
        with open(aside, "w") as file:
            file.write(f"{server.port}\n")
        os.replace(aside, _PORT_FILE.value)
    where = addresses.address(_HOST.value, server.port)
    with_what = _with_what(server.models)
    print(f"jblock: serving {models} on {where}{http}{metrics}{with_what}", flush=True)


def _with_what(infos: Sequence[api.ModelInfo]) -> str:
    """How long contexts are and what limits them, dtypes, KV and devices; "" where nobody knows."""
    if not infos or not infos[0].runs_on:
        return ""
    lengths = sorted({info.max_model_len for info in infos})
    context = " to ".join(f"{n:,}" for n in dict.fromkeys((lengths[0], lengths[-1])))
    limits = " or ".join(sorted({info.limited_by for info in infos if info.limited_by}))
    kv = min(info.kv_tokens for info in infos)
    room = f", room for {kv:,} tokens" if kv else ""
    return f"; context {context} tokens ({limits}), {infos[0].runs_on}{room}"


async def _serve(config: ServerConfig, engine: api.Engine) -> bool:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def told() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in _stopping():
        loop.add_signal_handler(number, told)
    drained = await serve(config, engine, stop, _announce, hurry)
    # asyncio.run cancels the tasks that are left, and grpc logs a cancelled one as an error.
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        await asyncio.wait(rest, timeout=1.0)
    return drained


def _engine(ends: contextlib.ExitStack) -> api.Engine:
    """The engine that the flags describe; what has to be ended after it goes to `ends`."""
    if _ENGINE_ADDRESS.value:
        if flags.FLAGS.zoo is not None or _SHARE_ENGINE.value:
            raise ValueError(
                "engine_address: the engine there has a zoo of its own; leave out zoo and share_engine"
            )
        return remote_engine(_ENGINE_ADDRESS.value)
    kwargs = engine_kwargs()
    if _PROFILER_PORT.value is not None:
        kwargs["profiler_port"] = _PROFILER_PORT.value
    budget = Budget(
        policy=_ADAPTIVE.value, measure=_ADAPTIVE_MEASURE.value, damage=_ADAPTIVE_DAMAGE.value
    )
    if budget.policy == "exact":
        return _started(kwargs, ends)
    zoo = Zoo.open(kwargs["zoo"])
    models = kwargs.get("models") or exact_models(zoo)
    kwargs["models"] = with_variants(zoo, models, budget)
    return AdaptiveEngine(_started(kwargs, ends), zoo, budget)


def _started(kwargs: dict[str, Any], ends: contextlib.ExitStack) -> api.Engine:
    """The engine, or the engines, of these arguments."""
    if agent_flags.are_wanted():
        if _ENGINE.value != "process":
            raise ValueError(
                f"agents: {agent_flags.AGENTS.value} of them are processes; give --engine=process"
            )
        return agent_flags.start(kwargs, _HEARTBEAT.value, ends)
    if _ENGINE.value == "process":
        return SupervisedEngine(
            lambda served: engine_processes.start_engine(kwargs, served, _HEARTBEAT.value)
        )
    return load_factory(engine_processes.FACTORY)(**kwargs)


def _share(engine: api.Engine, path: str) -> None:
    """Shares an engine out until a signal, then waits for open requests, as a server does."""
    try:
        shared = SharedEngine(engine, path)
    except OSError:
        engine.close()
        raise
    told, hurry, stop = threading.Event(), threading.Event(), threading.Event()

    def tell(number: int, frame: object) -> None:
        (hurry if told.is_set() else told).set()

    def wait() -> None:
        told.wait()
        drained(shared, _DRAIN_SECONDS.value, hurry)
        stop.set()

    for number in _stopping():
        signal.signal(number, tell)
    threading.Thread(target=wait, name="drain", daemon=True).start()
    shared.run(stop, lambda: print(f"jblock: an engine is shared at {path}", flush=True))


def _stopping() -> list[signal.Signals]:
    """The signals that end us; nohup has SIGHUP ignored, so that it does not."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [n for n in _STOPPING if n != signal.SIGHUP or not ignored]


def main(argv: list[str]) -> int:
    """Runs the server; returns the exit code: 0, 1 if the engine fails and cannot be replaced, 2 on bad
    configuration."""
    try:
        if len(argv) > 1:
            raise ValueError(f"arguments: {argv[1:]} are not understood; all options are flags")
        if _CONFIG.value:
            print(config_file.listed(flags.FLAGS), file=sys.stderr)
        config = ServerConfig(
            host=_HOST.value,
            port=_PORT.value,
            http_port=_HTTP_PORT.value,
            max_queue=_MAX_QUEUE.value,
            metrics_host=_METRICS_HOST.value,
            metrics_port=_METRICS_PORT.value,
            metrics_names=_METRICS_NAMES.value,
            drain_seconds=_DRAIN_SECONDS.value,
            tenants=TenantsFile(_AUTH_FILE.value) if _AUTH_FILE.value else EVERYBODY,
            open_health=_OPEN_HEALTH.value,
            tls=_certificates(),
            mtls_port=_MTLS_PORT.value,
            http_mtls_port=_HTTP_MTLS_PORT.value,
            metrics_auth=_METRICS_AUTH.value,
            request_log=_REQUEST_LOG.value,
        )
        with contextlib.ExitStack() as ends:
            if _SHARE_ENGINE.value:
                _share(_engine(ends), _SHARE_ENGINE.value)
            else:
                asyncio.run(_serve(config, _engine(ends)))
    except (ValueError, OSError) as error:
        print(f"jblock-serve: {error}", file=sys.stderr)
        return 2
    except api.EngineDied as error:
        print(f"jblock-serve: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: list[str]) -> list[str]:
    """The arguments that are no flags; ends with 2, as any bad configuration, on a bad flag."""
    try:
        return flags.FLAGS(config_file.expanded(argv, flags.FLAGS))
    except (flags.Error, ValueError) as error:
        print(f"jblock-serve: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Entry point of `jblock-serve`."""
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
