"""GPTQ and AWQ checkpoints, written here code by code as their layouts are documented: the weights in the
zoo are exactly those that the formulas give."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_checkpoints as tiny
from tiny_checkpoints import CONFIG

from jblock.blocks import quantize
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PARTS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def words(rows, bits: int, order) -> np.ndarray:
    """Rows of codes to rows of int32, the code of place order[k] of each word in its k-th lowest bits."""
    n = 32 // bits
    out = []
    for row in rows:
        packed = []
        for first in range(0, len(row), n):
            word = sum(int(row[first + order[k]]) << (bits * k) for k in range(n))
            packed.append(word - (1 << 32) if word >= 1 << 31 else word)
        out.append(packed)
    return np.array(out, np.int32)


def checkpoint(folder, method, bits=4, group=8, v2=False, act_order=False, **more):
    """A checkpoint folder, and the float32 weight [out, in] of every packed module."""
    rng = np.random.default_rng(0)
    tensors = {n: v for n, v in tiny.weights(CONFIG).items() if "proj" not in n}
    expected = {}
    for layer in range(tiny.LAYERS):
        for part in PARTS.values():
            name = f"model.layers.{layer}.{part}"
            inner, out = tiny.WIDTHS[part]
            size = inner if group == -1 else group
            groups = inner // size
            codes = rng.integers(0, 2**bits, (inner, out))
            zeros = rng.integers(1, 2**bits, (groups, out))
            scales = rng.uniform(0.01, 0.1, (groups, out)).astype(np.float16)
            g_idx = np.arange(inner) // size
            if act_order:
                g_idx = rng.permutation(g_idx)
            wide = scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx]).astype(np.float32)
            expected[name] = wide.T
            plain = range(32 // bits)
            if method == "gptq":
                tensors[f"{name}.qweight"] = words(codes.T, bits, plain).T.copy()
                tensors[f"{name}.qzeros"] = words(zeros - (0 if v2 else 1), bits, plain)
                tensors[f"{name}.g_idx"] = g_idx.astype(np.int32)
            else:
                tensors[f"{name}.qweight"] = words(codes, bits, AWQ_ORDER)
                tensors[f"{name}.qzeros"] = words(zeros, bits, AWQ_ORDER)
            tensors[f"{name}.scales"] = scales
            if method == "gptq" and part.endswith("q_proj"):
                tensors[f"{name}.bias"] = np.zeros(out, np.float16)
    quantization = {"quant_method": method, "bits": bits, "group_size": group, **more}
    if v2:
        quantization["checkpoint_format"] = "gptq_v2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, expected, tensors


@pytest.mark.parametrize(
    "case",
    [
        {"method": "gptq"},
        {"method": "gptq", "v2": True, "act_order": True, "desc_act": True},
        {"method": "gptq", "bits": 8, "group": -1},
        {"method": "awq", "version": "GEMM", "zero_point": True},
    ],
    ids=["gptq", "gptq_v2_act_order", "gptq_int8_whole_rows", "awq"],
)
def test_the_weights_are_those_of_the_formula(cli, tmp_path, case):
    folder, expected, tensors = checkpoint(tmp_path / "src", **case)
    cli.ok("hf", folder, "--name", "packed")
    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain("packed")
    assert chain.policy == "exact"
    checked = 0
    for index, step in enumerate(chain.steps):
        spec = zoo.component(step.component).spec
        stored = zoo.load_component(step.component)
        if spec.kind not in ("attention", "ffn"):
            continue
        for part in ("q", "k", "v", "o") if spec.kind == "attention" else ("gate", "up", "down"):
            name = f"model.layers.{(index - 1) // 2}.{PARTS[part]}"
            found = quantize.dequantize(stored, part, spec.quant)
            assert found.tolist() == expected[name].tolist(), name
            checked += 1
        norm = "input" if spec.kind == "attention" else "post_attention"
        original = tensors[f"model.layers.{(index - 1) // 2}.{norm}_layernorm.weight"]
        assert stored["norm.weight"].tolist() == original.tolist()
    assert checked == tiny.LAYERS * len(PARTS)
    assert fsck(zoo) == []
    cli.ok("verify", "packed", "--against", folder)
    planned = json.loads(cli.ok("plan", folder, "--name", "again", "--json"))
    assert planned["stored_bytes"] == 0
    result = cli("export", "packed", "--out", tmp_path / "out")
    assert result.code == 2 and f"was packed by {case['method']}" in result.err
    again = json.loads(cli.ok("hf", folder, "--name", "packed", "--json"))
    assert again["version"] == 1


def test_zero_points_of_zero_take_no_room(cli, tmp_path):
    """A symmetric checkpoint: all zeros are the middle, and none is stored."""
    folder, _, tensors = checkpoint(tmp_path / "src", "gptq")
    for name, value in tensors.items():
        if name.endswith(".qzeros"):
            tensors[name] = np.full_like(value, 0x77777777)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    cli.ok("hf", folder, "--name", "packed")
    zoo = Zoo.open(cli.zoo)
    spec = zoo.component(zoo.chain("packed").steps[1].component).spec
    assert (spec.quant.bits, spec.quant.group, spec.quant.zeros) == (4, 8, False)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm', whose layout is not known"),
        ({"bits": 3}, "gptq with bits 3: how they are packed is not known"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin', whose layout is not known"),
        ({"quant_method": "awq", "version": "gemv"}, "only the packing of 'gemm' is known"),
        ({"dynamic": {"x": 1}}, "'dynamic', whose rules are not known"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": 5}, "groups of 5 or words of 8 codes do not divide"),
        ({"group_size": 4}, "makes it int32 [4, 2]: one of the two is of another packing"),
        ({"quant_method": "awq"}, "makes it int32 [16, 2]"),
    ],
)
def test_what_is_not_known_is_refused(cli, tmp_path, fields, said):
    folder, _, _ = checkpoint(tmp_path / "src", "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    result = cli("hf", folder, "--name", "packed")
    assert result.code == 2 and said in result.err, result.err
    assert not cli.zoo.exists() or Zoo.open(cli.zoo).chains() == []


def damaged(tensors, name):
    """The tensors of a checkpoint with one thing wrong."""
    q = "model.layers.1.mlp.up_proj"
    changed = dict(tensors)
    if name == "ambiguous zero":
        changed[f"{q}.qzeros"] = np.full_like(tensors[f"{q}.qzeros"], -1)
    elif name == "uneven groups":
        changed[f"{q}.g_idx"] = np.zeros_like(tensors[f"{q}.g_idx"])
    elif name == "missing scales":
        del changed[f"{q}.scales"]
    elif name == "bias":
        changed[f"{q}.bias"] = np.ones(24, np.float16)
    elif name == "half packed":
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del changed[f"{q}.{part}"]
        changed[f"{q}.weight"] = np.zeros((24, 16), np.float16)
    elif name == "packed head":
        changed["lm_head.qweight"] = changed.pop("lm_head.weight").astype(np.int32)
    return changed


@pytest.mark.parametrize(
    "name, said",
    [
        ("ambiguous zero", "whether that is 16 or 0 is not known"),
        ("uneven groups", "does not give 8 inputs to each group"),
        ("missing scales", "up_proj.scales' is missing"),
        ("bias", "is not zero, and config.json describes a projection without bias"),
        ("half packed", "only ['down', 'gate'] are packed"),
        ("packed head", "'lm_head.qweight' is packed, which is served for attentions"),
    ],
)
def test_what_does_not_fit_is_refused(cli, tmp_path, name, said):
    folder, _, tensors = checkpoint(tmp_path / "src", "gptq")
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(damaged(tensors, name), path, {"format": "pt"})
    result = cli("hf", folder, "--name", "packed")
    assert result.code == 2 and said in result.err, result.err
