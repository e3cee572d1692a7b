"""Families: what a config says becomes the right specs, in both spellings, or is refused."""

import pytest

from jblock.blocks.spec import RopeSpec
from jblock.families import ConfigError, families, family_for

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def plan(architecture, **change):
    config = BASE | {"architectures": [f"{architecture}ForCausalLM"]} | change
    return family_for(config).plan(config)


def attention(architecture, **change):
    return [s.spec for s in plan(architecture, **change).steps if s.spec.kind == "attention"]


def test_every_family_is_found_by_itself():
    assert {"llama", "mistral", "qwen2", "qwen3", "mixtral", "gemma2"} <= families().keys()
    assert family_for({"model_type": "qwen2"}).name == "qwen2"


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_steps_follow_the_model(name):
    steps = plan(name).steps
    kinds = [s.spec.kind for s in steps]
    assert kinds == ["embedding", *["attention", "ffn"] * 4, "norm", "unembedding"]
    assert [s.layer for s in steps] == [None, 0, 0, 1, 1, 2, 2, 3, 3, None, None]
    for step in steps:
        assert step.tensors.keys() == step.spec.tensors().keys()
    names = [n for s in steps for n in s.tensors.values()]
    assert len(set(names)) == len(names)
    assert not any("{" in n for n in names)


def test_what_tells_the_families_apart():
    llama, mistral, qwen2, qwen3 = (attention(n)[0] for n in ("Llama", "Mistral", "Qwen2", "Qwen3"))
    assert (llama.head_dim, llama.qkv_bias, llama.qk_norm) == (16, False, False)
    assert mistral.sliding_window == 4096
    assert (qwen2.head_dim, qwen2.qkv_bias, qwen2.sliding_window) == (16, True, None)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)


@pytest.mark.parametrize(
    ("change", "rope"),
    [
        ({}, RopeSpec()),
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        *(
            (
                change,
                RopeSpec(
                    kind="llama3",
                    theta=5e5,
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position=128,
                ),
            )
            for change in (
                {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
                {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
                {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            )
        ),
    ],
)
def test_rope_in_both_spellings(change, rope):
    assert attention("Llama", **change)[0].rope == rope


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic"}},
        {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "attention_factor": 1.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": {"rope_theta": 1.0}},
        {"rope_scaling": {"mrope_section": [1, 2], "type": "default"}},
        {"rope_parameters": {"partial_rotary_factor": 1.5}},
        {"rope_parameters": {"rope_theta": float("inf")}},
        {"rope_scaling": "llama3"},
    ],
)
def test_rope_that_is_not_known_is_refused(change):
    with pytest.raises(ConfigError, match="rope"):
        plan("Llama", **change)


@pytest.mark.parametrize(
    ("name", "change", "windows"),
    [
        ("Mistral", {"sliding_window": None}, [None] * 4),
        ("Mistral", {"sliding_window": 8}, [8] * 4),
        ("Qwen2", {"sliding_window": 8}, [None] * 4),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 8}, [None] * 4),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            [None, None, None, 8],
        ),
        (
            "Qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            [None, 8, None, 8],
        ),
        ("Qwen3", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, [None] * 4),
    ],
)
def test_windows(name, change, windows):
    assert [a.sliding_window for a in attention(name, **change)] == windows


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("Qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ("Qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Qwen3", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("Qwen3", {"attention_bias": True}, "attention_bias"),
        ("Qwen2", {"use_mrope": True}, "use_mrope"),
        ("Mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("Mistral", {"sliding_window": 0}, "sliding_window"),
        ("Llama", {"max_position_embeddings": None}, "max_position_embeddings"),
        ("Llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("Llama", {"num_hidden_layers": True}, "num_hidden_layers"),
        ("Llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ],
)
def test_refusals_name_the_field(name, change, word):
    with pytest.raises(ConfigError, match=word):
        plan(name, **change)


def test_older_spellings():
    heads = attention("Llama", num_key_value_heads=None)[0]
    assert heads.num_kv_heads == 4
    assert attention("Llama", head_dim=None, hidden_act="swish")[0].head_dim == 16
    tied = plan("Llama", tie_word_embeddings=True)
    assert tied.steps[-1].tensors == {"weight": "model.embed_tokens.weight"}
    assert tied.copies == {"lm_head.weight": "model.embed_tokens.weight"}
