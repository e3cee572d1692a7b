"""`jblock-serve`: serves the models of a zoo over gRPC."""

import asyncio
import os
import signal
import sys

from absl import app, flags

from jblock.engine import api
from jblock.engine.process import ProcessEngine
from jblock.engine.process_main import load_factory
from serving.server import Server, ServerConfig, serve
from serving.tenants import EVERYBODY, Tenants

_FACTORY = "jblock.engine.agent:build_engine"

_ZOO = flags.DEFINE_string("zoo", None, "Folder of the zoo.", required=True)
_MODELS = flags.DEFINE_list(
    "models", None, "Chains to serve; default: all of the zoo that are exact."
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8470, "Port to listen on; 0 picks a free one.")
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
_OPEN_HEALTH = flags.DEFINE_bool(
    "open_health", False, "Answer health checks without a key, for probes that can send none."
)
_ENGINE = flags.DEFINE_enum(
    "engine", "process", ["process", "thread"], "Where the engine's loop runs."
)
_PROFILER_PORT = flags.DEFINE_integer(
    "profiler_port",
    None,
    "Port of the engine's XLA profiler server; default: none.",
    lower_bound=1,
    upper_bound=65535,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Type of the weights in matmuls."
)
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", None, "Most sequences in flight.")
_MAX_MODEL_LEN = flags.DEFINE_integer(
    "max_model_len", None, "Most tokens of prompt and output together."
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", None, "Tokens a KV page holds.")
_KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", None, ["float32", "int8"], "Type of the KV cache; int8 is approximate."
)
_KV_MEMORY_MB = flags.DEFINE_integer(
    "kv_memory_mb", None, "Memory of the KV cache; default: a share of what is free."
)
_HOST_KV_MEMORY_MB = flags.DEFINE_integer(
    "host_kv_memory_mb", None, "Host memory for the KV of requests that gave way to others."
)
_STEP_MS = flags.DEFINE_integer(
    "step_ms", None, "Milliseconds a step should take at most while answers stream."
)
_MESH = flags.DEFINE_string(
    "mesh", None, "Devices to split every block over, such as tp=4; default: one."
)
_ADAPTER_SLOTS = flags.DEFINE_integer(
    "adapter_slots", None, "Adapters on the device at a time, of 16 ranks each on average."
)
_WEIGHTS_MEMORY_MB = flags.DEFINE_integer(
    "weights_memory_mb", None, "Parameters on the device at most; 0: all that are served."
)
_HOST_CACHE_MB = flags.DEFINE_integer(
    "host_cache_mb", None, "Host memory for adapters and parameters that are not on the device."
)
_PINNED = flags.DEFINE_list("pinned", None, "Chains that are always on the device.")
_SHARE = flags.DEFINE_bool("share", None, "Share blocks between models; --noshare: a set each.")

_ENGINE_FLAGS = (
    _ZOO,
    _MODELS,
    _DTYPE,
    _MAX_NUM_SEQS,
    _MAX_MODEL_LEN,
    _PAGE_SIZE,
    _KV_DTYPE,
    _KV_MEMORY_MB,
    _HOST_KV_MEMORY_MB,
    _STEP_MS,
    _MESH,
    _ADAPTER_SLOTS,
    _WEIGHTS_MEMORY_MB,
    _HOST_CACHE_MB,
    _PINNED,
    _SHARE,
    _PROFILER_PORT,
)


def engine_kwargs() -> dict:
    """The factory's arguments; what was not given keeps the engine's own default."""
    return {f.name: f.value for f in _ENGINE_FLAGS if f.value is not None}


def _announce(server: Server) -> None:
    models = f"{server.num_models} model" + "s" * (server.num_models != 1)
    metrics = f", metrics on port {server.metrics_port}" if server.metrics_port else ""
    if _PORT_FILE.value:
        # Aside and renamed: who waits for the file never reads half a number.
        aside = f"{_PORT_FILE.value}.{os.getpid()}"
        with open(aside, "w") as file:
            file.write(f"{server.port}\n")
        os.replace(aside, _PORT_FILE.value)
    print(f"jblock: serving {models} on {_HOST.value}:{server.port}{metrics}", flush=True)


async def _serve(config: ServerConfig, engine: api.Engine) -> bool:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    drained = await serve(config, engine, stop, _announce)
    # asyncio.run cancels the tasks that are left, and grpc logs a cancelled one as an error.
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    if rest:
        await asyncio.wait(rest, timeout=1.0)
    return drained


def main(argv: list[str]) -> int:
    """Runs the server; returns the exit code: 0, 1 if the engine fails, 2 on bad configuration."""
    try:
        if len(argv) > 1:
            raise ValueError(f"arguments: {argv[1:]} are not understood; all options are flags")
        config = ServerConfig(
            host=_HOST.value,
            port=_PORT.value,
            max_queue=_MAX_QUEUE.value,
            metrics_host=_METRICS_HOST.value,
            metrics_port=_METRICS_PORT.value,
            drain_seconds=_DRAIN_SECONDS.value,
            tenants=Tenants.load(_AUTH_FILE.value) if _AUTH_FILE.value else EVERYBODY,
            open_health=_OPEN_HEALTH.value,
        )
        engine: api.Engine
        if _ENGINE.value == "process":
            engine = ProcessEngine(_FACTORY, engine_kwargs())
        else:
            engine = load_factory(_FACTORY)(**engine_kwargs())
        asyncio.run(_serve(config, engine))
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
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"jblock-serve: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Entry point of `jblock-serve`."""
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
