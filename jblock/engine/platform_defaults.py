"""What an engine is set up with where nobody says, by the platform it computes on: the one place that knows.

On a CPU it is what EngineConfig has: float32, which is exact and as fast there, and grids that a few cores
get through in a step. An accelerator multiplies bfloat16 at twice the rate or more and reads half the bytes,
and its calls take as long for one row as for dozens, so there are more rows in a call.
"""

import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jblock.engine.config import EngineConfig

if TYPE_CHECKING:  # It imports jax, which the front end does without.
    from jblock.blocks.platform import Platform

ACCELERATOR: Mapping[str, Any] = types.MappingProxyType(
    {
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "max_num_seqs": 256,
        # Those over max_num_seqs count as that.
        "decode_sizes": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
        "prefill_grids": (
            *((1, 16), (8, 16)),
            *((1, 64), (8, 64)),
            *((1, 256), (8, 256)),
            *((1, 1024), (2, 1024)),
        ),
    }
)
"""Fields of EngineConfig where a TPU or GPU computes."""

# Parts of jax's device_kind: what the Mosaic GPU kernels are for (compute capability 9.0).
_HOPPER = ("H100", "H200", "H800", "GH200", "H20")


def engine_config(settings: Mapping[str, Any], platform: "Platform") -> EngineConfig:
    """The settings of a server: what is not given is the platform's default, and the context the models' own.

    Args:
      settings: fields of EngineConfig that were given; lists where it has tuples.
      platform: what computes.

    Raises:
      ValueError: a setting that cannot be used.
    """
    grids = {n: tuple(map(tuple, settings[n])) for n in ("prefill_grids",) if n in settings}
    sizes = {n: tuple(settings[n]) for n in ("decode_sizes",) if n in settings}
    defaults = {} if platform.name == "cpu" else dict(ACCELERATOR)
    return EngineConfig(**{"max_model_len": 0, **defaults, **settings, **grids, **sizes})


def default_backend(platform: "Platform", kv_dtype: str) -> str:
    """Whose kernels serve where nobody says, one of `backends.BACKENDS`; "": as `backends.backend_of` has it.

    Hopper's are its own, as far as they pass the self-test at the start (`self_test.run`); they have no pages
    of float32.
    """
    hopper = platform.name == "gpu" and any(chip in platform.kind for chip in _HOPPER)
    return "mosaic_gpu" if hopper and kv_dtype != "float32" else ""
