"""Programs compile for accelerators that are not here, where their compilers are installed."""

import importlib.metadata
import itertools
import os
import subprocess
import sys
import warnings

import jax.numpy as jnp
import pytest

from jblock import compile_check, compile_matrix
from jblock.blocks.platform import Platform
from jblock.compile_matrix import Result
from jblock.engine.weights.params import abstract_params
from jblock.parallel import targets
from jblock.parallel.placement import Placement
from jblock.parallel.rules import ONE_DEVICE
from jblock.parallel.spread import kv_heads
from jblock.parallel.targets import CHIPS, Target
from jblock.tools.real_models import MODELS

# What the `compile` extra installs.
COMPILERS = ("libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


@pytest.fixture
def compilers():
    """Skips, and says so at the end of the run, where a compiler is missing."""
    for package in COMPILERS:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            reason = f"NOT RUN: the compile matrix needs {package} (the extra `compile`)"
            warnings.warn(reason, stacklevel=1)
            pytest.skip(reason)


def run(*flags: str) -> subprocess.CompletedProcess:
    """The command."""
    return subprocess.run(
        [sys.executable, "-m", "jblock.compile_check", *flags],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


def test_a_spread_of_the_compile_matrix(compilers):
    done = run("--quick")
    assert done.returncode == 0, done.stderr[-4000:]
    for model, _, target in compile_matrix.QUICK:
        assert f"| {model} | bfloat16 | {target} |" in done.stderr
    for target in compile_matrix.QUICK_KERNELS:
        for op in compile_matrix.ops(Target.parse(target)):
            assert f"| {op} |  | {target} |" in done.stderr


@pytest.mark.long
def test_the_whole_compile_matrix(compilers):
    done = run()
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_table_names_every_case():
    assert {model for model, _ in compile_matrix.SMALLEST} == set(MODELS)
    chips = {(t.chip, t.chips) for t in map(Target.parse, compile_matrix.TARGETS)}
    assert chips == {(k, n) for k in ("v5e", "v6e", "v5p") for n in (1, 4, 8)} | {
        ("h200", n) for n in (1, 2, 4, 8)
    }
    for smallest in compile_matrix.SMALLEST.values():
        assert set(smallest) == set(CHIPS) - {"cpu"}
    assert set(compile_matrix.QUICK) <= set(compile_matrix.CASES)
    large, targets = compile_matrix.LARGE_FLOAT32
    every = set(itertools.product(compile_matrix.SMALLEST, compile_matrix.TARGETS))
    left_out = every - {((model, dtype), target) for model, dtype, target in compile_matrix.CASES}
    assert left_out == {(large, t) for t in compile_matrix.TARGETS if t not in targets}
    assert {model for model, _ in left_out} == {large}


class Tpu(Placement):
    """The default device, taken for a TPU."""

    platform = Platform("tpu", "TPU v5 lite")


def test_what_should_fit_follows_from_weights_and_kv():
    """Without a compiler: the even share of the weights, the KV pools, and little beside them."""
    sizes = {}
    for name, dtype in compile_matrix.SMALLEST:
        model = MODELS[name]
        forms = dict.fromkeys(model.ends(dtype, ONE_DEVICE), 1)
        forms |= model.layer_signatures(dtype, ONE_DEVICE)
        sizes[name, dtype] = sum(
            count * a.size * a.dtype.itemsize
            for signature, count in forms.items()
            for part in abstract_params(signature, Tpu())
            for a in part.values()
        )
    for (name, dtype), target_name in itertools.product(sizes, compile_matrix.TARGETS):
        target = Target.parse(target_name)
        attention, chips = MODELS[name].attention, target.chips
        heads = len(kv_heads(attention.num_kv_heads, chips)) // chips
        tokens = compile_matrix.SEQUENCES * compile_matrix.TOKENS
        width = max(attention.head_dim, 128) if target.platform == "tpu" else attention.head_dim
        kv = tokens * len(MODELS[name].layers) * 2 * heads * width * jnp.dtype(dtype).itemsize
        needed = sizes[name, dtype] / chips + kv + 2**27
        fits = needed <= CHIPS[target.chip].memory * compile_matrix.USABLE
        smallest = compile_matrix.SMALLEST[name, dtype][target.chip]
        assert fits == (chips >= smallest), (name, dtype, target_name, needed / 2**30)


def test_models_have_the_sizes_their_names_say():
    def parameters(name: str) -> int:
        model = MODELS[name]
        specs = [model.embedding, model.norm, *(s for layer in model.layers for s in layer)]
        specs += [] if model.tied else [model.unembedding]
        shapes = [shape for s in specs for shape in s.tensors().values()]
        return sum(a * (b[0] if b else 1) for a, *b in shapes)

    billions = {"qwen3-0.6b": 0.6, "llama3-8b": 8.0, "gemma3-27b": 27.0, "qwen3-32b": 32.8}
    for name, size in (billions | {"mixtral-8x7b": 46.7, "llama3-70b": 70.6}).items():
        assert abs(parameters(name) / 1e9 - size) < 0.02 * size, name


def test_a_page_takes_the_rows_of_the_targets_that_were_checked(tmp_path):
    def result(target: str, **fields) -> Result:
        return Result(
            model="m", dtype="bfloat16", target=target, programs=1, code_bytes=0, **fields
        )

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compile_check -->\n<!-- end -->\nafter\n")
    compile_check._write(page, [result("cuda:h200"), result("tpu:v5e:1x1")])
    compile_check._write(page, [result("cuda:h200", fits=False)])
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert text.index("tpu:v5e:1x1") < text.index("cuda:h200") and text.count("h200") == 1
    assert "refused, NOT EXPECTED" in text
    assert not result("cuda:h200", failures=("x: no",)).as_expected


def test_without_ptxas_a_gpu_is_refused_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(targets, "_installed", lambda package: package == "jax_plugins.xla_cuda13")
    monkeypatch.setattr(targets.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"ptxas: pip install 'jblock\[compile\]'"):
        Target.parse("cuda:h200").devices()
