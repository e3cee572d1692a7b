"""FP8, compressed-tensors and bitsandbytes checkpoints, written here as their layouts are documented: the
weights in the zoo are exactly those that the formulas give, and the engine's blocks compute with them."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints as tiny
from tiny_checkpoints import CONFIG

from jblock.blocks import layout
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo

E4M3 = ml_dtypes.float8_e4m3fn
PARTS = {
    "attention": {p: f"self_attn.{p}_proj" for p in "qkvo"},
    "ffn": {p: f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}
# NF4's book, of the appendix of arXiv 2305.14314, as bitsandbytes stores it.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def words_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, columns] of unsigned codes -> int32 words along columns, the first in the lowest bits."""
    n = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % n))).astype(np.uint64)
    shifts = np.arange(n, dtype=np.uint64) * np.uint64(bits)
    words = (padded.reshape(len(codes), -1, n) << shifts).sum(axis=-1, dtype=np.uint64)
    return words.astype(np.uint32).view(np.int32)


def fp8(rng, out, inner, block=None, scale_dtype=np.float32):
    """A module's tensors and the weight they stand for."""
    weight = rng.normal(0, 50, (out, inner)).astype(np.float32).astype(E4M3)
    rows, columns = block or (out, inner)
    shape = (-(-out // rows), -(-inner // columns)) if block else ()
    scale = rng.uniform(1e-3, 2e-3, shape).astype(scale_dtype)
    wide = np.repeat(np.repeat(np.atleast_2d(scale), rows, 0), columns, 1)[:out, :inner]
    tensors = {"weight": weight, "weight_scale_inv": np.asarray(scale)}
    if not block:
        tensors["activation_scale"] = np.asarray(np.float32(0.5))
    return tensors, weight.astype(np.float32) * wide.astype(np.float32)


def int8(rng, out, inner, zeros=False):
    codes = rng.integers(-128, 128, (out, inner)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (out, 1)).astype(ml_dtypes.bfloat16)
    tensors = {"weight": codes, "weight_scale": scale}
    zero = np.zeros((out, 1), np.int8)
    if zeros:
        zero = tensors["weight_zero_point"] = rng.integers(-9, 9, (out, 1)).astype(np.int8)
    return tensors, (codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)


def float8_channel(rng, out, inner):
    weight = rng.normal(0, 50, (out, inner)).astype(np.float32).astype(E4M3)
    scale = rng.uniform(1e-3, 2e-3, (out, 1)).astype(np.float32)
    return {"weight": weight, "weight_scale": scale}, weight.astype(np.float32) * scale


def w4a16(rng, out, inner, zeros=False, g_idx=False):
    groups = inner // 8
    codes = rng.integers(-8, 8, (out, inner))
    scale = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float32)
    zero = rng.integers(-8, 8, (out, groups)) if zeros else np.zeros((out, groups), int)
    of = rng.permutation(np.arange(inner) // 8) if g_idx else np.arange(inner) // 8
    tensors = {
        "weight_packed": words_of(codes + 8, 4),
        "weight_scale": scale,
        "weight_shape": np.array([out, inner], np.int64),
    }
    if zeros:
        tensors["weight_zero_point"] = np.ascontiguousarray(words_of((zero + 8).T, 4).T)
    if g_idx:
        tensors["weight_g_idx"] = of.astype(np.int32)
    return tensors, scale[:, of] * (codes - zero[:, of]).astype(np.float32)


def nf4(rng, out, inner, nested=False, dtype="float32"):
    count, block = out * inner, 48  # blocks cross the ends of rows
    blocks = -(-count // block)
    codes = rng.integers(0, 16, count).astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": dtype, "shape": [out, inner]}
    tensors = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": NF4}
    if nested:
        book = np.sort(rng.normal(0, 1, 256)).astype(np.float32)
        outer = rng.uniform(0.01, 0.02, -(-blocks // 4)).astype(np.float32)
        inside = rng.integers(0, 256, blocks).astype(np.uint8)
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.03125}
        tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": book}
        tensors["weight.absmax"] = inside
        absmax = book[inside] * np.repeat(outer, 4)[:blocks] + np.float32(0.03125)
    else:
        absmax = tensors["weight.absmax"] = rng.uniform(0.1, 0.2, blocks).astype(np.float32)
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = raw
    weight = (NF4[codes] * np.repeat(absmax, block)[:count]).reshape(out, inner)
    return tensors, weight.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))).astype(np.float32)


def llm_int8(rng, out, inner):
    codes = rng.integers(-127, 128, (out, inner)).astype(np.int8)
    scb = rng.uniform(0.5, 1, out).astype(np.float32)
    tensors = {"weight": codes, "SCB": scb, "weight_format": np.array(0, np.uint8)}
    return tensors, codes.astype(np.float32) * (scb / np.float32(127))[:, None]


def compressed(form, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CASES = {
    "fp8_blocks": (
        FP8 | {"weight_block_size": [12, 5]},
        lambda r, o, i: fp8(r, o, i, (12, 5)),
    ),
    "fp8_bfloat16_scales": (
        FP8 | {"weight_block_size": [128, 128]},
        lambda r, o, i: fp8(r, o, i, (128, 128), ml_dtypes.bfloat16),
    ),
    "fp8_static": (FP8 | {"weight_block_size": None, "activation_scheme": "static"}, fp8),
    "w8a8": (compressed("int-quantized", num_bits=8, strategy="channel"), int8),
    "w8a8_zeros": (
        compressed("int-quantized", num_bits=8, symmetric=False),
        lambda r, o, i: int8(r, o, i, zeros=True),
    ),
    "w8a8_float": (compressed("float-quantized", num_bits=8, strategy="channel"), float8_channel),
    "w4a16": (compressed("pack-quantized", num_bits=4, group_size=8), w4a16),
    "w4a16_zeros_order": (
        compressed("pack-quantized", num_bits=4, group_size=8, actorder="group"),
        lambda r, o, i: w4a16(r, o, i, zeros=True, g_idx=True),
    ),
    "nf4": (BNB, nf4),
    "nf4_nested_bfloat16": (BNB, lambda r, o, i: nf4(r, o, i, nested=True, dtype="bfloat16")),
    "llm_int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, llm_int8),
}


def checkpoint(folder, quantization, make):
    """A checkpoint folder, and the float32 weight [out, in] of every packed module."""
    rng = np.random.default_rng(0)
    tensors = {n: v for n, v in tiny.weights(CONFIG).items() if "proj" not in n}
    expected = {}
    for layer in range(tiny.LAYERS):
        for part in (p for parts in PARTS.values() for p in parts.values()):
            name = f"model.layers.{layer}.{part}"
            inner, out = tiny.WIDTHS[part]
            made, expected[name] = make(rng, out, inner)
            tensors |= {f"{name}.{n}": v for n, v in made.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    return folder, expected, tensors


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_the_formula(cli, tmp_path, name):
    folder, expected, _ = checkpoint(tmp_path / "src", *CASES[name])
    result = cli("hf", folder, "--name", "packed")
    assert result.code == 0, result.err
    rounded = name.startswith(("fp8", "llm_int8"))
    assert ("only its weights are" in result.err) == rounded
    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain("packed")
    checked = 0
    for index, step in enumerate(chain.steps):
        spec = zoo.component(step.component).spec
        if spec.kind not in PARTS:
            continue
        stored = zoo.load_component(step.component)
        floats = layout.floats(spec, stored)
        computed = layout.to_compute(spec, stored)
        assert {n: v.shape for n, v in computed.items()} == layout.compute_shapes(spec)
        for part, module in PARTS[spec.kind].items():
            wanted = expected[f"model.layers.{(index - 1) // 2}.{module}"]
            assert floats[f"{part}.weight"].tolist() == wanted.tolist()
            if spec.quant.made_float:
                assert computed[f"{part}.weight"].tolist() == wanted.tolist()
            checked += 1
    assert checked == tiny.LAYERS * 7
    assert fsck(zoo) == []
    cli.ok("verify", "packed", "--against", folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size [128]"),
        (FP8 | {"weight_block_size": [2, 2]}, "config.json is of another packing"),
        (compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed("int-quantized") | {"sparsity_config": {"format": "2:4"}}, "sparsity_config"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4', whose layout is not known"),
    ],
)
def test_what_is_not_known_is_refused(cli, tmp_path, change, said):
    folder, _, _ = checkpoint(tmp_path / "src", change, CASES["fp8_blocks"][1])
    result = cli("hf", folder, "--name", "packed")
    assert result.code == 2 and said in result.err


def damaged(name, change):
    """A case, and what is done to its tensors."""
    return pytest.param(name, change, id=f"{name}-{change.__name__}")


def without_scales(tensors):
    del tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"]


def with_nan(tensors):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name].view(np.uint8)[0, 0] = 0x7F


def with_one_float(tensors):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)


def of_another_shape(tensors):
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes()) | {"shape": [1, 2]}
    tensors[name] = np.frombuffer(json.dumps(state).encode(), np.uint8)


def without_state(tensors):
    del tensors["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        damaged("fp8_blocks", without_scales),
        damaged("fp8_blocks", with_nan),
        damaged("fp8_blocks", with_one_float),
        damaged("nf4", of_another_shape),
        damaged("nf4", without_state),
    ],
)
def test_damaged_files_are_refused(cli, tmp_path, name, change):
    folder, _, tensors = checkpoint(tmp_path / "src", *CASES[name])
    change(tensors)
    tiny.write_safetensors(folder / "model.safetensors", tensors)
    result = cli("hf", folder, "--name", "packed")
    assert result.code == 2, result.err
    assert "_proj" in result.err or "ffn component" in result.err
