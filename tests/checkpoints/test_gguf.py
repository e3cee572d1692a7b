"""GGUF files: what llama.cpp's converter wrote is read back as the checkpoint it was made from; every type of
quantization gives the numbers of the `gguf` package; what is not known is refused by name."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from tiny_checkpoints import write_checkpoint, write_safetensors

from checkpoints.errors import CheckpointError
from checkpoints.gguf import tensors
from checkpoints.gguf.config import Fields, config
from checkpoints.gguf.file import read_gguf
from checkpoints.opening import open_checkpoint

FIXTURES = Path(__file__).parent.parent / "fixtures"
# What llama.cpp has no key for, and so takes as the published models have it.
GEMMA = {"layer_types": None}
CASES = {
    "llama_gqa_untied": {},
    "llama3_rope": {},
    "qwen2_bias": {},
    "qwen3_qknorm": {},
    "gemma2": GEMMA,
    "gemma3": GEMMA | {"sliding_window_pattern": 6, "_sliding_window_pattern": 6},
}
TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_checkpoint_it_was_made_from(case, tmp_path):
    made = open_checkpoint(FIXTURES / "gguf" / f"{case}.gguf")
    folder = tmp_path / case
    folder.mkdir()
    for file in (FIXTURES / "hf" / case).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    given = json.loads((folder / "config.json").read_text()) | CASES[case]
    if case.startswith("gemma"):
        given["query_pre_attn_scalar"] = given["head_dim"]
    (folder / "config.json").write_text(json.dumps(given))
    wanted = open_checkpoint(folder)
    assert [s.spec for s in made.plan.steps] == [s.spec for s in wanted.plan.steps]
    assert made.plan.max_position == wanted.plan.max_position
    for step in wanted.plan.steps:
        for name in step.tensors.values():
            got, want = made.source.read(name), wanted.source.read(name)
            assert got.dtype == want.dtype
            # The weight of a Gemma norm lies there with 1 added, in float32.
            exact = not (case.startswith("gemma") and name.endswith("norm.weight"))
            np.testing.assert_allclose(got, want, rtol=0, atol=0 if exact else 1e-6)


def test_it_converts_verifies_and_exports(cli, tmp_path):
    file = FIXTURES / "gguf" / "llama3_rope.gguf"
    assert "added" in cli.ok("gguf", file, "--name", "g")
    assert "unchanged" in cli.ok("gguf", file, "--name", "g")
    assert cli("verify", "g", "--against", file).code == 0
    out = tmp_path / "out"
    cli.ok("export", "g", "--out", out)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert cli("verify", "g", "--against", out).code == 0
    # The same numbers under the same names: a component of one is a component of the other.
    cli.ok("hf", FIXTURES / "hf" / "llama3_rope", "--name", "h")
    totals = json.loads(cli.ok("list", "--json"))["totals"]
    assert totals["stored_bytes"] * 2 == totals["logical_bytes"]


def blocks(kind: TYPES, rows: int, columns: int) -> np.ndarray:
    """Random weights in one type: quantized by the package where it can, else random codes in blocks whose
    float16 scales are small."""
    random = np.random.default_rng(kind)
    try:
        return gguf.quants.quantize(random.standard_normal((rows, columns), np.float32), kind)
    except NotImplementedError:
        pass
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = random.integers(0, 256, (rows, columns // per_block, size), np.uint8)
    scales = {TYPES.Q4_K: (0, 2), TYPES.Q5_K: (0, 2), TYPES.Q6_K: (208,)}[kind]
    for at in scales:
        values = random.uniform(-0.01, 0.01, raw.shape[:2]).astype(np.float16)
        raw[..., at : at + 2] = values.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_every_quantization_bit_by_bit(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_SLICE", 5 * 512)  # rows in several slices, the last one short
    kind = TYPES[name]
    packed = blocks(kind, 32, 512)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("token_embd.weight", packed, raw_dtype=kind)
    write(writer)
    tensor = read_gguf(tmp_path / "t.gguf").tensors["token_embd.weight"]
    got = tensors.read(tensor)
    assert got.dtype == np.float32
    assert got.shape == (32, 512)
    assert got.tobytes() == gguf.quants.dequantize(packed, kind).tobytes()
    assert got.std() > 1e-4


def test_float_types_stay_what_they_are(tmp_path):
    random = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("a", random)
    writer.add_tensor("b", random.astype(np.float16))
    writer.add_tensor("c", gguf.quants.quantize(random, TYPES.BF16), raw_dtype=TYPES.BF16)
    write(writer)
    found = read_gguf(tmp_path / "t.gguf").tensors
    a, b, c = (tensors.read(found[n]) for n in "abc")
    assert [x.dtype.name for x in (a, b, c)] == ["float32", "float16", "bfloat16"]
    assert a.tobytes() == random.tobytes()
    assert b.tobytes() == random.astype(np.float16).tobytes()
    np.testing.assert_array_equal(
        c.astype(np.float32), gguf.quants.dequantize(c.view(np.uint8), TYPES.BF16)
    )
    np.testing.assert_allclose(c.astype(np.float32), random, rtol=2**-8)


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewritten(path: Path, change: dict, tensors: dict | None = None) -> Path:
    """The llama fixture with other metadata (None: without the key) and further tensors."""
    source = gguf.GGUFReader(FIXTURES / "gguf" / "llama_gqa_untied.gguf")
    fields = {
        k: f.contents()
        for k, f in source.fields.items()
        if not k.startswith(("GGUF.", "general.architecture"))
    }
    fields |= change
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    held = {t.name: np.array(t.data) for t in source.tensors} | (tensors or {})
    for name, value in held.items():
        if value is not None:
            writer.add_tensor(name, value)
    write(writer)
    return path


@pytest.mark.parametrize(
    ("change", "tensors", "said"),
    [
        ({"general.architecture": "mamba"}, {}, "general.architecture is 'mamba'"),
        ({"general.type": "adapter"}, {}, "PEFT"),
        ({"general.type": "mmproj"}, {}, "the language model itself"),
        ({"llama.embedding_length": None}, {}, "llama.embedding_length"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count is 8"),
        ({"llama.residual_scale": 0.5}, {}, "llama.residual_scale"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "rope.scaling.type"),
        ({"llama.rope.dimension_count": 4}, {}, "part of a head"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, {}, "layer_norm_rms_epsilon"),
        ({}, {"blk.0.attn_q.weight": None}, "q_proj.weight'"),
        ({}, {"blk.0.new.weight": np.ones(4, np.float32)}, "blk.0.new.weight"),
        ({}, {"token_embd.weight": None}, "token_embd.weight"),
        ({}, {"output_norm.weight": np.ones(7, np.float32)}, "model.norm.weight"),
        ({}, {"rope_freqs.weight": np.ones(3, np.float32)}, "rope_freqs.weight"),
        ({"tokenizer.ggml.model": "rwkv"}, {}, "tokenizer.ggml.model is 'rwkv'"),
        (
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "new",
                "tokenizer.ggml.tokens": ["a"],
            },
            {},
            "pre is 'new'",
        ),
        ({"tokenizer.ggml.model": "gpt2"}, {}, "tokenizer"),
    ],
)
def test_what_is_not_known_is_refused_by_name(change, tensors, said, cli, tmp_path):
    path = rewritten(tmp_path / "t.gguf", change, tensors)
    result = cli("gguf", path, "--name", "g")
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err


def test_types_that_are_not_served_are_refused(cli, tmp_path):
    kind = TYPES.TQ1_0
    path = rewritten(tmp_path / "t.gguf", {})
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(
        "x", blocks(TYPES.Q8_0, 1, 256)[:, : gguf.GGML_QUANT_SIZES[kind][1]], raw_dtype=kind
    )
    write(writer)
    with pytest.raises(CheckpointError, match="TQ1_0"):
        tensors.read(read_gguf(path).tensors["x"])


def test_a_damaged_file_is_refused(cli, tmp_path):
    whole = (FIXTURES / "gguf" / "llama_gqa_untied.gguf").read_bytes()
    path = tmp_path / "t.gguf"
    for cut in (3, 4, 20, 100, 700, 5000, len(whole) - 1):
        path.write_bytes(whole[:cut])
        result = cli("gguf", path, "--name", "g")
        assert result.code == 2, cut
        assert "t.gguf" in result.err
        assert "Traceback" not in result.err
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in random.integers(0, 4000, 8):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        assert cli("gguf", path, "--name", "g").code in (0, 2)
    for version in (1, 4, 0x03000000):
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        assert "version" in (err := cli("gguf", path, "--name", "g").err) or "big-endian" in err


def test_parts_of_one_model(cli, tmp_path):
    source = gguf.GGUFReader(FIXTURES / "gguf" / "llama_gqa_untied.gguf")
    held = {t.name: np.array(t.data) for t in source.tensors}
    second = {n: v for n, v in held.items() if n.startswith("blk.1.")}
    first = tmp_path / "m-00001-of-00002.gguf"
    split = {"split.count": 2, "split.no": 0, "split.tensors.count": len(held)}
    rewritten(first, split, dict.fromkeys(second))
    result = cli("gguf", first, "--name", "g")
    assert result.code == 2
    assert "00002-of-00002" in result.err
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00002.gguf", "llama")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 2)
    for name, value in second.items():
        writer.add_tensor(name, value)
    write(writer)
    cli.ok("gguf", first, "--name", "g")
    cli.ok("gguf", FIXTURES / "gguf" / "llama_gqa_untied.gguf", "--name", "whole")
    totals = json.loads(cli.ok("list", "--json"))["totals"]
    assert totals["stored_bytes"] * 2 == totals["logical_bytes"]


def rope(metadata: dict, factors: np.ndarray | None = None) -> dict:
    base = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    }
    return config(Fields(base | metadata, "t"), 8, frozenset(), factors)


def test_numbers_of_a_config():
    assert rope({})["rms_norm_eps"] == 1e-5
    assert rope({})["rope_theta"] == 10000.0
    assert rope({})["tie_word_embeddings"] is True
    assert rope({"llama.rope.freq_base": 500000.0})["rope_theta"] == 500000.0
    assert rope({"llama.attention.sliding_window": 16})["architectures"] == ["MistralForCausalLM"]
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16,
    }
    assert rope(yarn)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    assert "rope_scaling" not in rope({}, np.ones(4, np.float32))
    with pytest.raises(CheckpointError, match="which of the two"):
        rope(linear, np.full(4, 2, np.float32))
    other = rope({}, np.array([1, 2, 3, 4.5], np.float32))["rope_scaling"]
    assert other["short_factor"] == other["long_factor"] == [1, 2, 3, 4.5]


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]


def vocabulary(more: list[str]) -> list[str]:
    """The 256 bytes as GPT-2 writes them, and further tokens."""
    return [chr(b) if b in BYTES else chr(256 + i) for i, b in enumerate(range(256))] + more


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "a 123", ["a", "Ġ", "123"]),
        ("smollm", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "a 1234", ["a", "Ġ", "123", "4"]),
        ("qwen2", "a 123", ["a", "Ġ", "1", "2", "3"]),
        ("tekken", "aB 123", ["a", "B", "Ġ", "1", "2", "3"]),
    ],
)
def test_text_is_split_as_the_name_says(pre, text, pieces):
    from checkpoints.gguf.tokenizer import tokenizer

    tokens = sorted(set(vocabulary([]))) + ["Ġ"] * 0
    tokens += ["12", "123", "<s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["1 2", "12 3"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    found = tokenizer(metadata, "llama", "t")
    made = tokenizers.Tokenizer.from_str(found.files["tokenizer.json"].decode())
    assert made.encode(text).tokens == ["<s>", *pieces]
    assert made.decode(made.encode(text).ids) == text
    assert found.eos == (len(tokens) - 1,)
    settings = json.loads(found.files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["add_bos_token"]) == ("<s>", True)
    assert found.files["chat_template.jinja"] == b"{{ messages }}"


def test_other_commands_say_what_a_file_is(cli, tmp_path):
    """`plan` takes it; `hf` and `gguf` name each other."""
    file = FIXTURES / "gguf" / "qwen2_bias.gguf"
    assert "would be stored" in cli.ok("plan", file)
    assert "convert gguf" in cli("hf", file).err
    folder = write_checkpoint(tmp_path / "hf")
    assert "convert hf" in cli("gguf", folder).err
    write_safetensors(tmp_path / "x.gguf", {})
    assert "does not begin with 'GGUF'" in cli("gguf", tmp_path / "x.gguf").err
