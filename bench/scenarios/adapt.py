"""What measuring, compressing and distilling take a layer, and from that a model of a shape."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.report import progress
from jblock.adapt import codecs, layers
from jblock.adapt.forward import Weights
from jblock.blocks import quantize
from jblock.blocks.compressed_spec import BitsTarget
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.rope_spec import RopeSpec
from jblock.blocks.spec import AttentionSpec, FfnSpec, NormSpec, UnembeddingSpec

_RANK = 128  # the largest that compress tries
_HEAD_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags: the shape, by default that of Llama 7B."""
    parser.add_argument("--hidden_size", type=int, default=4096)
    parser.add_argument("--intermediate_size", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument(
        "--tokens", type=int, default=512, help="of a row that goes through a layer"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """One layer of the shape with random weights: seconds forward and back to its input for a token, the
    unembedding for a token, and encoding all its projections. From these the hours of each command for all
    layers, by `_hours`: by the clock, and in `detail` of one core, which work beside it lengthens less."""
    if args.quick:
        args.hidden_size, args.intermediate_size, args.heads, args.kv_heads = 64, 192, 4, 2
        args.layers, args.vocab_size, args.tokens = 2, 128, 16
    d, rng = args.hidden_size, np.random.default_rng(0)
    attention = AttentionSpec(
        hidden_size=d,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=d // args.heads,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10000.0),
    )
    ffn = FfnSpec(hidden_size=d, intermediate_size=args.intermediate_size, norm_eps=1e-5)
    head = (
        NormSpec(hidden_size=d, eps=1e-5),
        UnembeddingSpec(hidden_size=d, vocab_size=args.vocab_size),
    )
    layer, top = _random((attention, ffn), rng), _random(head, rng)
    x = jnp.asarray(rng.standard_normal((1, args.tokens, d), np.float32))
    progress("one layer, forward and back")
    s = {
        "forward": _seconds(lambda: layers.through(layer, x, 0)) / args.tokens,
        "back": _seconds(lambda: layers.back(layer, x, 0, x)) / args.tokens,
    }
    rows = x[:, : min(args.tokens, _HEAD_TOKENS)]
    s["logits"] = _seconds(lambda: layers.logits(top, rows)) / rows.shape[1]
    s |= {name: np.zeros(2) for name in ("svd", "bits", "quantize")}
    for tensors in layer.tensors:
        for name, value in tensors.items():
            if value.ndim != 2:
                continue
            progress(f"encoding {name} {value.shape}")
            matrix = np.asarray(value, np.float32)
            s["svd"] += _seconds(lambda m=matrix: codecs.decompose(m, _RANK))
            target = BitsTarget(bits=2)
            s["bits"] += _seconds(lambda m=matrix, t=target: codecs.few_bits(m, t)[0]["scales"])
            spec = QuantSpec(bits=4, group=min(64, matrix.shape[1]))
            s["quantize"] += _seconds(lambda m=matrix, s=spec: quantize.quantize(m, s)["scales"])
    wall, cpu = ({name: float(of[i]) for name, of in s.items()} for i in (0, 1))
    return {
        "adapt": _hours(wall, args.layers),
        "detail": {
            "core_hours": _hours(cpu, args.layers),
            "layer_parameters": sum(t.size for ts in layer.tensors for t in ts.values()),
            **{f"{n}_us_per_token": round(1e6 * wall[n], 1) for n in ("forward", "back", "logits")},
            "encode_s": {name: round(wall[name], 2) for name in ("svd", "bits", "quantize")},
            "core_s": {name: round(seconds, 6) for name, seconds in cpu.items()},
            "dtype": layers.compute_dtype(),
            "layers": args.layers,
        },
    }


def _hours(s: dict[str, float], count: int) -> dict[str, float]:
    """Hours of each command for `count` such layers, at its defaults.

    measure: 8,192 tokens of text and as many of items through two models, logits of the text three times.
    compress: the singular values once, six settings of bits and the chosen one again. quantize: all
    projections once. surrogate: 300 steps of 1,024 tokens, two layers in the middle: the data through the
    model three times less often than it is drawn, and each step forward and back through the upper half.
    equivalence: two candidates a layer, each through the layers above it, and as many tries together.
    """
    tokens, step = 2 * 8192, 1024
    once = count * s["forward"] * tokens + 2 * s["logits"] * tokens / 2
    hours = {
        "measure": 2 * once,
        "compress": count * (s["svd"] + 7 * s["bits"]),
        "quantize": count * s["quantize"],
        "surrogate": 300
        * step
        * (
            count * s["forward"] / 3
            + count / 2 * (s["forward"] + s["back"])
            + 2 * (s["forward"] + 2 * s["back"])
            + 4 * s["logits"]
        ),
        "equivalence": 2 * 2 * count * once / 2,
    }
    return {name: round(seconds / 3600, 3) for name, seconds in hours.items()}


def _random(specs: tuple[Any, ...], rng: np.random.Generator) -> Weights:
    dtype = layers.compute_dtype()
    tensors = tuple(
        {
            name: jnp.asarray(
                0.02 * rng.standard_normal(shape, np.float32),
                dtype if len(shape) == 2 else "float32",
            )
            for name, shape in spec.tensors().items()
        }
        for spec in specs
    )
    return Weights(specs, tensors)


def _seconds(work: Callable[[], Any]) -> np.ndarray:
    """Of the second call, by the clock and of all cores together; the first compiles."""
    jax.block_until_ready(work())
    begin, used = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    return np.array([time.perf_counter() - begin, time.process_time() - used])
