"""Families: what a config says becomes the right specs, in both spellings, or is refused."""

import numpy as np
import pytest

from jblock.blocks import layout
from jblock.blocks.spec import AttentionSpec, FfnSpec, RopeSpec, SpecError, projection_shape
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
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
HEADS = {
    "hidden_size": 12,
    "num_heads": 4,
    "head_dim": 6,
    "norm_eps": 1e-5,
    "rope": None,
    "qkv_bias": True,
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
        {"rope_scaling": {"rope_type": "dynamic"}},
        {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_parameters": {"rope_theta": 1.0}},
        {"rope_scaling": {"mrope_section": [1, 2], "type": "mrope"}},
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
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
        ("Qwen3", {"attention_bias": "yes"}, "attention_bias"),
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


def test_layers_of_a_mixture():
    change = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 20,
        "mlp_only_layers": [1],
        "num_hidden_layers": 2,
    }
    steps = plan("Qwen2Moe", **change).steps[1:-2]
    kinds = [(s.spec.kind, s.fused_with_previous) for s in steps]
    experts = [("expert", True)] * 4
    assert kinds == [
        ("attention", False),
        ("router", False),
        *experts,
        ("attention", False),
        ("ffn", False),
    ]
    assert steps[4].tensors["up.weight"] == "model.layers.0.mlp.experts.2.up_proj.weight"
    assert [s.spec.intermediate_size for s in steps[2:6]] == [8, 8, 8, 20]


@pytest.mark.parametrize(
    ("name", "change", "windows"),
    [
        ("Gemma2", {"sliding_window": 8}, [8, None, 8, None]),
        ("Gemma3", {"sliding_window": 8, "sliding_window_pattern": 3}, [8, 8, None, 8]),
        ("Gemma3", {"sliding_window": 8}, [8, 8, 8, 8]),
        ("Mixtral", {}, [None] * 4),
        ("Phi3", {"sliding_window": 8}, [8] * 4),
        ("Qwen3Moe", MOE, [None] * 4),
        ("Qwen3Moe", MOE | {"use_sliding_window": True, "sliding_window": 8}, [8] * 4),
    ],
)
def test_windows_of_newer_families(name, change, windows):
    assert [a.sliding_window for a in attention(name, **change)] == windows


def test_ropes_of_gemma3():
    change = {
        "rope_theta": 1e6,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 4,
    }
    ropes = [a.rope for a in attention("Gemma3", **change)]
    wide = RopeSpec(kind="linear", theta=1e6, factor=8.0)
    assert ropes == [RopeSpec(theta=500.0)] * 3 + [wide]


def test_ropes_that_depend_on_the_length():
    """What is served ends where they would change."""
    dynamic = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert attention("Llama", **dynamic)[0].rope == RopeSpec()
    change = {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    }
    long = plan("Phi3", **change)
    assert long.max_position == 64
    assert long.steps[1].spec.rope.factors == (1.0,) * 8
    change["rope_scaling"]["short_factor"] = [1.0] * 7
    with pytest.raises(ConfigError, match="short_factor"):
        plan("Phi3", **change)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("Qwen2Moe", MOE | {"mlp_only_layers": "all"}, "mlp_only_layers"),
        ("Qwen2Moe", MOE | {"use_sliding_window": True}, "layer_types"),
        ("Mixtral", {"num_experts_per_tok": 9}, "top_k 9"),
        ("Gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Gemma2", {"hidden_activation": "relu"}, "hidden_activation"),
        ("Gemma3", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters"),
        ("Olmo2", {"clip_qkv": 8.0}, "clip_qkv"),
        ("GPTNeoX", {"rotary_pct": 2.0}, "rotary_pct"),
        ("GPTNeoX", {"rotary_emb_base": "x"}, "rotary_emb_base"),
    ],
)
def test_refusals_of_newer_families(name, change, word):
    config = BASE | {"architectures": [f"{name}ForCausalLM"]} | change
    if name == "GPTNeoX":
        del config["num_key_value_heads"]
    with pytest.raises((ConfigError, SpecError), match=word):
        family_for(config).plan(config)


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("Llama4ForConditionalGeneration", "Llama 4"),
        ("Qwen3NextForCausalLM", "Qwen3-Next"),
        ("Qwen3_5ForConditionalGeneration", "Qwen 3.5"),
        ("Gemma3nForConditionalGeneration", "Gemma 3n"),
        ("Gemma4ForConditionalGeneration", "Gemma 4"),
        ("DeepseekV2ForCausalLM", "DeepSeek V2"),
        ("DeepseekV3ForCausalLM", "DeepSeek V3"),
        ("GptOssForCausalLM", "gpt-oss"),
    ],
)
def test_models_of_a_later_day_are_refused_by_name(architecture, model):
    code = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    for config in ({"architectures": [architecture]}, {"architectures": [architecture]} | code):
        with pytest.raises(ConfigError, match=f"{model}.* is not served yet"):
            family_for(config)


def test_a_native_architecture_needs_no_code_of_the_checkpoint():
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}}
    assert family_for({"architectures": ["Phi3ForCausalLM"]} | code).name == "phi3"
    with pytest.raises(ConfigError, match="auto_map"):
        family_for({"architectures": ["OwnForCausalLM"]} | code)


@pytest.mark.parametrize(
    ("name", "change", "ropes"),
    [
        ("SmolLM3", {}, [True, True, True, False]),
        ("SmolLM3", {"no_rope_layers": [0, 1, 1, 1]}, [False, True, True, True]),
        ("Cohere2", {"sliding_window": 8, "sliding_window_pattern": 2}, [True, False] * 2),
    ],
)
def test_layers_without_rope(name, change, ropes):
    assert [a.rope is not None for a in attention(name, **change)] == ropes


GRANITE4 = {
    "num_local_experts": 0,
    "shared_intermediate_size": 24,
    "position_embedding_type": "rope",
    "layer_types": ["attention"] * 4,
}


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("SmolLM3", {"layer_types": ["sliding_attention"] * 4}, "sliding_window"),
        ("Cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("Granite", {"residual_multiplier": 0}, "residual_multiplier"),
        ("GraniteMoeHybrid", GRANITE4 | {"layer_types": ["mamba"] * 4}, "mamba"),
        ("GraniteMoeHybrid", GRANITE4 | {"num_local_experts": 8}, "num_local_experts"),
        ("GraniteMoeHybrid", GRANITE4 | {"position_embedding_type": "alibi"}, "position_embedding"),
        ("Olmo3", {"rope_theta": 1e4}, "rope_theta"),
        ("Gemma", {"hidden_activation": "relu"}, "hidden_activation"),
        (
            "Ministral3",
            {"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "original_max_position_embeddings",
        ),
    ],
)
def test_refusals_of_the_families_of_today(name, change, word):
    with pytest.raises(ConfigError, match=word):
        plan(name, **change)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}


def test_gpt2():
    config = GPT2 | {"architectures": ["GPT2LMHeadModel"]}
    steps = family_for(config).plan(config).steps
    assert steps[0].spec.num_positions == 64
    assert steps[1].spec.tensors()["qkv.weight"] == (32, 96)
    assert projection_shape(steps[1].spec, "qkv") == (96, 32)
    assert (steps[2].spec.intermediate_size, steps[2].spec.activation) == (128, "gelu_tanh")
    with pytest.raises(ConfigError, match="n_head"):
        family_for(config).plan(config | {"n_head": 0})


def test_names_without_their_prefix():
    """The first GPT-2 checkpoints leave "transformer." out."""
    config = GPT2 | {"model_type": "gpt2"}
    whole = family_for(config).plan(config)
    names = [n for s in whole.steps for n in s.tensors.values()]
    bare = [n.removeprefix("transformer.") for n in names]
    assert whole.fitting(names) == whole
    assert [n for s in whole.fitting(bare).steps for n in s.tensors.values()] == bare


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(qkv="joined", transposed=True, num_kv_heads=2, **HEADS),
        AttentionSpec(qkv="by_head", num_kv_heads=4, **HEADS),
        FfnSpec(hidden_size=12, intermediate_size=10, norm_eps=1e-5, joined=True, bias=True),
    ],
)
def test_fused_projections_are_cut_without_loss(spec):
    """Every stored number is in exactly one projection, rows of one head together."""
    stored, at = {}, 0
    for name, shape in spec.tensors().items():
        size = int(np.prod(shape))
        stored[name] = np.arange(at, at + size).reshape(shape)
        at += size
    computed = layout.to_compute(spec, stored)
    assert {n: v.shape for n, v in computed.items()} == layout.compute_shapes(spec)
    assert sorted(np.concatenate([v.ravel() for v in computed.values()])) == list(range(at))
    if isinstance(spec, AttentionSpec):
        fused = stored["qkv.weight"].T if spec.transposed else stored["qkv.weight"]
        first_v = 2 * 6 if spec.qkv == "by_head" else (4 + 2) * 6
        np.testing.assert_array_equal(computed["v.weight"][:6], fused[first_v : first_v + 6])
