"""The flags that set an engine up: what `jblock-serve` serves, and `jblock-compile` builds for."""

from typing import Any

from absl import flags

from jblock.engine.config import KV_DTYPES, EngineConfig
from jblock.engine.platform_defaults import ACCELERATOR

_BACKENDS = (
    "xla",
    "cpu",
    "tpu",
    "mosaic_gpu",
)  # those of jblock.pallas_kernels.backends, without jax


def _help(name: str, text: str) -> str:
    """What a setting of the engine does, and what it is where nobody says."""
    here, there = getattr(EngineConfig, name), ACCELERATOR.get(name)
    on_accelerators = "" if there is None else f"; on accelerators {_words(there)}"
    return f"{text} Default: {_words(here)}{on_accelerators}."


def _words(default: Any) -> str:
    """A setting, as its flag says it."""
    return ",".join(map(_word, default)) if isinstance(default, tuple) else str(default)


def _word(value: Any) -> str:
    """An entry of a list, as a flag says it."""
    return "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


_FLAGS = (
    flags.DEFINE_string("zoo", None, "Folder or URL of the zoo."),
    flags.DEFINE_list("models", None, "Chains to serve; default: all of the zoo that are exact."),
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], _help("dtype", "Type of the weights in matmuls.")
    ),
    flags.DEFINE_integer("max_num_seqs", None, _help("max_num_seqs", "Most sequences in flight.")),
    flags.DEFINE_integer(
        "max_model_len",
        None,
        "Most tokens of prompt and output together. Default: what the models take, as far as KV memory goes.",
    ),
    flags.DEFINE_integer("page_size", None, _help("page_size", "Tokens a KV page holds.")),
    flags.DEFINE_enum(
        "kv_dtype",
        None,
        list(KV_DTYPES),
        _help("kv_dtype", "Type of the KV cache; all but float32 are approximate."),
    ),
    flags.DEFINE_integer(
        "kv_memory_mb", None, "Memory of the KV cache; default: a share of what is free."
    ),
    flags.DEFINE_integer(
        "host_kv_memory_mb",
        None,
        _help("host_kv_memory_mb", "Host memory for the KV of requests that gave way to others."),
    ),
    flags.DEFINE_integer(
        "step_ms",
        None,
        _help("step_ms", "Milliseconds a step should take at most while answers stream."),
    ),
    flags.DEFINE_integer(
        "max_draft_tokens",
        None,
        _help(
            "max_draft_tokens",
            "Tokens drafted and verified in one step of a sequence, at most, where it pays; 0: none.",
        ),
    ),
    flags.DEFINE_string(
        "mesh", None, "Devices to split every block over, such as tp=4; default: one."
    ),
    flags.DEFINE_integer(
        "adapter_slots",
        None,
        _help("adapter_slots", "Adapters on the device at a time, of 16 ranks each on average."),
    ),
    flags.DEFINE_integer(
        "weights_memory_mb",
        None,
        _help("weights_memory_mb", "Parameters on the device at most; 0: all that are served."),
    ),
    flags.DEFINE_integer(
        "host_cache_mb",
        None,
        _help(
            "host_cache_mb", "Host memory for adapters and parameters that are not on the device."
        ),
    ),
    flags.DEFINE_float(
        "read_seconds",
        None,
        _help("read_seconds", "How long reading one adapter or component of the zoo may take."),
    ),
    flags.DEFINE_list(
        "decode_sizes", None, _help("decode_sizes", "Batch sizes that decoding is compiled for.")
    ),
    flags.DEFINE_list(
        "prefill_grids",
        None,
        _help("prefill_grids", "Grids prompts are compiled for, sequences x tokens of each."),
    ),
    flags.DEFINE_enum(
        "backend",
        None,
        _BACKENDS,
        "Whose kernels serve. Default: the platform's own, mosaic_gpu on Hopper once it passed a self-test.",
    ),
    flags.DEFINE_list("pinned", None, "Chains that are always on the device."),
    flags.DEFINE_bool(
        "share", None, "Share blocks between models; --noshare: a set each. Default: shared."
    ),
    flags.DEFINE_enum(
        "verify",
        None,
        ["always", "once", "never"],
        "Whether hashes of what is loaded from the zoo are checked; once: until a file changes (default).",
    ),
    flags.DEFINE_string(
        "executable_cache",
        None,
        "Folder of compiled programs, outside the zoo; default: the user's own. What lies in it is run.",
    ),
)


def engine_kwargs() -> dict[str, Any]:
    """The arguments of `jblock.engine.factory.build_engine` that were given; what was not keeps the engine's
    own default.

    Raises:
      ValueError: a list names nothing, or a model twice.
    """
    given: dict[str, Any] = {f.name: f.value for f in _FLAGS if f.value is not None}
    if "models" in given:
        _check_models(given["models"])
    for name, form in _GRIDS.items():
        if name in given:
            given[name] = [_numbers(name, word, form) for word in given[name]]
    if "decode_sizes" in given:
        given["decode_sizes"] = [size for (size,) in given["decode_sizes"]]
    if not given.get("zoo"):
        raise ValueError("zoo: is missing; give the folder or URL of a zoo")
    return given


_GRIDS = {"decode_sizes": "8", "prefill_grids": "4x16"}


def _numbers(name: str, word: str, example: str) -> list[int]:
    """The whole numbers of one entry, as many as in an example."""
    parts = word.split("x")
    if len(parts) != example.count("x") + 1 or not all(p.isdecimal() and int(p) for p in parts):
        raise ValueError(f"{name}: {word!r} is no entry; give some like {example}, commas between")
    return [int(part) for part in parts]


def _check_models(names: list[str]) -> None:
    """Whether a list of chains names some, each once."""
    if not names or not all(names):
        raise ValueError(
            f"models: {','.join(names)!r} leaves a name empty; give names with commas between, or leave the "
            "flag out to serve all"
        )
    bare = [name.partition("@")[0] for name in names]
    twice = sorted({name for name in bare if bare.count(name) > 1})
    if twice:
        raise ValueError(f"models: {twice[0]!r} is there twice; a name is served in one version")


def command_line(arguments: dict[str, Any]) -> str:
    """These arguments as flags."""
    words = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no{name}")
        else:
            text = ",".join(map(_word, value)) if isinstance(value, (list, tuple)) else value
            words.append(f"--{name}={text}")
    return " ".join(words)
