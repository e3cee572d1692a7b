"""Adapters as they are published: named otherwise, with the base's own embeddings, or for a base that they
cannot ride on."""

import json

import numpy as np
import pytest
import tiny_checkpoints as tiny
from test_bad_input import refused
from test_export import same_files
from tiny_checkpoints import ADAPTER, CONFIG

from checkpoints.adapters.peft_config import read_settings
from jblock.zoo.store import Zoo

UNNAMED = ADAPTER | {"base_model_name_or_path": ""}
TIED = CONFIG | {"tie_word_embeddings": True}
EMBED, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"


@pytest.fixture
def base(cli, tmp_path):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    return cli


def components(cli, name):
    return [s.component for s in Zoo.open(cli.zoo).chain(name).steps]


def taken(cli, source, on="base", name="ad"):
    cli.ok("peft", source, "--base", on, "--name", name)
    cli.ok("verify", name, "--against", source)
    planned = json.loads(cli.ok("plan", source, "--base", on, "--name", "again", "--json"))
    assert planned["stored_bytes"] == 0
    cli.ok("export", name, "--out", source.parent / f"{name}-out")
    same_files(source, source.parent / f"{name}-out")


PREFIXES = {
    "its own name": (lambda n: n.replace(".weight", ".default.weight"), ["default", "save_pretr"]),
    "another name": (lambda n: n.replace(".weight", ".mine.weight"), ["adapter's own name"]),
    "another wrapper": (lambda n: n.replace("model.model.", "model.model.inner."), ["inner."]),
    "compiled": (
        lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
        ["_orig"],
    ),
    "no prefix": (lambda n: n.removeprefix("base_model.model."), ["no prefix", "save_pretrained"]),
    "twice": (lambda n: f"base_model.model.{n}", ["base_model.model.base_model.model."]),
}


@pytest.mark.parametrize("targets", [ADAPTER["target_modules"], ".*_proj"], ids=["list", "regex"])
@pytest.mark.parametrize(("rename", "words"), PREFIXES.values(), ids=PREFIXES.keys())
def test_a_prefix_is_told(base, tmp_path, rename, words, targets):
    tensors = {rename(n): v for n, v in tiny.adapter_weights().items()}
    config = ADAPTER | {"target_modules": targets}
    source = tiny.write_adapter(tmp_path / "ad", config, tensors)
    refused(base, [*words, "expected"], "peft", source, "--base", "base", "--name", "ad")


WITHIN = {
    "as transformers 5 has it": "base_model.model.model.language_model.",
    "as transformers 4 had it": "base_model.model.language_model.model.",
}


@pytest.mark.parametrize("prefix", WITHIN.values(), ids=WITHIN.keys())
def test_an_adapter_on_the_text_model_within_a_multimodal_one(base, tmp_path, prefix):
    """It is the adapter that it would be on the text model alone; patterns speak of the names it has."""
    pattern = {"language_model.*layers.1.self_attn.q_proj": 6, "layers.0.*v_proj": 5}
    plain = {"layers.1.self_attn.q_proj": 6, "layers.0.*v_proj": 5}
    tensors = tiny.adapter_weights()
    within = {n.replace("base_model.model.model.", prefix): v for n, v in tensors.items()}
    config = ADAPTER | {"alpha_pattern": pattern}
    taken(base, tiny.write_adapter(tmp_path / "within", config, within), name="within")
    config = ADAPTER | {"alpha_pattern": plain}
    taken(base, tiny.write_adapter(tmp_path / "alone", config, tensors), name="alone")
    zoo = Zoo.open(base.zoo)
    assert zoo.chain("within").steps == zoo.chain("alone").steps
    head = prefix.replace("language_model.model.", "language_model.lm_head.")
    if head != prefix:  # the head lies within too
        both = within | {f"{head}weight": tiny.weights(CONFIG)["lm_head.weight"]}
        taken(base, tiny.write_adapter(tmp_path / "head", ADAPTER, both), name="head")


ACTIVATED = ADAPTER | {"alora_invocation_tokens": [7, 8]}


def test_an_activated_lora_is_told_from_a_plain_one(base, tmp_path):
    """What it does is another thing, though its tensors are the same; and it is taken as it was saved."""
    for name, config in (("plain", ADAPTER), ("ad", ACTIVATED)):
        taken(base, tiny.write_adapter(tmp_path / name, config), name=name)
    zoo = Zoo.open(base.zoo)
    plain, activated = zoo.chain("plain"), zoo.chain("ad")
    assert (plain.invocation, activated.invocation) == ((), (7, 8))
    assert components(base, "ad") == components(base, "base")
    assert plain.digest != activated.digest
    assert {zoo.delta(d).spec.invocation for s in activated.steps for d in s.deltas} == {(7, 8)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alora_invocation_tokens": "go"}, ["alora_invocation_tokens", "'go'", "token ids"]),
        ({"alora_invocation_tokens": [7, -1]}, ["[7, -1]", "token ids"]),
        ({"alora_invocation_tokens": [7, True]}, ["token ids"]),
        ({"alora_invocation_tokens": [7, 32]}, ["32", "vocabulary", "31"]),
        ({"use_dora": True}, ["use_dora", "alora_invocation_tokens"]),
        ({"bias": "all"}, ["bias", "'all'", "alora_invocation_tokens"]),
        ({"modules_to_save": ["norm"]}, ["modules_to_save", "alora_invocation_tokens"]),
    ],
    ids=str,
)
def test_what_would_act_before_the_invocation_is_refused(base, tmp_path, fields, words):
    source = tiny.write_adapter(tmp_path / "ad", ACTIVATED | fields)
    refused(base, words, "peft", source, "--base", "base", "--name", "ad")


def test_nothing_rides_on_an_activated_lora_nor_it_on_deltas(base, tmp_path):
    source = tiny.write_adapter(tmp_path / "ad", ACTIVATED | {"base_model_name_or_path": ""})
    plain = tiny.write_adapter(tmp_path / "plain", UNNAMED)
    base.ok("peft", source, "--base", "base", "--name", "ad")
    base.ok("peft", plain, "--base", "base", "--name", "plain")
    refused(base, ["activated", "--base base@1"], "peft", plain, "--base", "ad", "--name", "on")
    refused(base, ["has deltas"], "peft", source, "--base", "plain", "--name", "on")
    words = ["alora_invocation_tokens", "only plain LoRA"]
    refused(base, words, "merge", "--name=m", "--adapter", "ad=0.5", "--adapter", "plain=0.5")


def test_what_adapts_the_vision_part_is_left_out(base, tmp_path):
    """And written again by an export; an adapter of nothing else is none."""
    tensors = tiny.adapter_weights()
    base.ok("peft", tiny.write_adapter(tmp_path / "text", ADAPTER), "--base", "base", "--name=text")
    prefix = "base_model.model.model."
    tensors = {n.replace(prefix, f"{prefix}language_model."): v for n, v in tensors.items()}
    tensors[f"{prefix}vision_tower.layers.0.q_proj.lora_A.weight"] = np.ones((4, 8), np.float32)
    source = tiny.write_adapter(tmp_path / "ad", ADAPTER, tensors)
    said = base("peft", source, "--base", "base", "--name", "ad").err
    assert "1 tensors are left out" in said and "vision_tower" in said
    taken(base, source)
    zoo = Zoo.open(base.zoo)
    assert zoo.chain("ad").steps == zoo.chain("text").steps
    alone = {n: v for n, v in tensors.items() if "vision" in n}
    config = ADAPTER | {"target_modules": ".*vision.*"}
    source = tiny.write_adapter(tmp_path / "vision", config, alone)
    words = ["no tensors of an adapter"]
    refused(base, words, "peft", source, "--base", "base", "--name", "vision")


def test_the_base_s_own_embeddings_are_not_stored_again(base, tmp_path):
    own = tiny.weights(CONFIG)
    tensors = tiny.adapter_weights()
    tensors |= {EMBED: own["model.embed_tokens.weight"], HEAD: own["lm_head.weight"]}
    taken(base, tiny.write_adapter(tmp_path / "ad", tensors=tensors))
    assert components(base, "ad") == components(base, "base")


def test_embeddings_of_its_own_are_private(base, tmp_path):
    tensors = tiny.adapter_weights() | {EMBED: np.ones((32, 16), np.float32)}
    taken(base, tiny.write_adapter(tmp_path / "ad", tensors=tensors))
    private = [
        a != b for a, b in zip(components(base, "ad"), components(base, "base"), strict=True)
    ]
    assert private == [True] + [False] * (len(private) - 1)


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("rows", [40, 30])
def test_a_resized_vocabulary(cli, tmp_path, config, rows):
    source = tiny.write_checkpoint(tmp_path / "base", config)
    cli.ok("hf", source, "--name", "base")
    tensors = tiny.adapter_weights() | {EMBED: np.ones((rows, 16), np.float32)}
    if config is CONFIG:
        tensors[HEAD] = np.full((rows, 16), 2, np.float32)
    taken(cli, tiny.write_adapter(tmp_path / "ad", tensors=tensors))
    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain("ad")
    first, last = (zoo.component(chain.steps[i].component).spec for i in (0, -1))
    assert chain.vocab_size == first.vocab_size == last.vocab_size == rows
    head = zoo.load_component(chain.steps[-1].component)["weight"]
    assert (head == (2 if config is CONFIG else 1)).all()


def test_half_of_a_resized_vocabulary(base, tmp_path):
    tensors = tiny.adapter_weights() | {EMBED: np.ones((40, 16), np.float32)}
    source = tiny.write_adapter(tmp_path / "ad", tensors=tensors)
    words = ["40", "32", "only one", "save_embedding_layers"]
    refused(base, words, "peft", source, "--base", "base", "--name", "ad")


@pytest.mark.parametrize(
    ("options", "module", "allowed"),
    [
        ({"layers_to_transform": [1]}, "model.layers.1.mlp.experts.0.w1", True),
        ({"layers_to_transform": [1]}, "model.layers.0.mlp.experts.1.w1", False),
        ({"layers_to_transform": 1}, "model.layers.1.mlp.experts.3.w1", True),
        (
            {"layers_to_transform": [1], "layers_pattern": "layers"},
            "model.layers.1.mlp.experts.0.w1",
            True,
        ),
        (
            {"layers_to_transform": [0], "layers_pattern": ["h", "experts"]},
            "model.layers.1.mlp.experts.0.w1",
            True,
        ),
        ({"layers_to_transform": [1], "layers_pattern": "h"}, "model.layers.1.mlp.w1", False),
    ],
)
def test_the_first_number_is_the_layer_s(options, module, allowed):
    assert read_settings(ADAPTER | {"target_modules": ["w1"]} | options).allows(module) is allowed


def dora(tmp_path):
    tensors = tiny.adapter_weights()
    for name in [n for n in tensors if n.endswith("lora_B.weight")]:
        vector = name.replace("lora_B.weight", "lora_magnitude_vector")
        tensors[vector] = np.ones(len(tensors[name]), np.float32)
    return tiny.write_adapter(tmp_path / "dora", UNNAMED | {"use_dora": True}, tensors)


def test_dora_needs_float_weights(base, tmp_path):
    base.ok("quantize", "base", "--bits", "8", "--group", "8")
    source = dora(tmp_path)
    words = ["use_dora", "base-int8", "few bits", "float model"]
    argv = ("--base", "base-int8", "--name", "ad")
    refused(base, words, "peft", source, *argv)
    refused(base, words, "plan", source, *argv)
    base.ok("peft", source, "--base", "base", "--name", "ad")
    lora = tiny.write_adapter(tmp_path / "lora", UNNAMED)
    base.ok("peft", lora, *argv[:2], "--name", "lora")


def test_two_prompts_are_refused_when_converted(base, tmp_path):
    config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    tensors = {"prompt_embeddings": np.ones((4, 16), np.float32)}
    source = tiny.write_adapter(tmp_path / "prompt", config, tensors)
    base.ok("peft", source, "--base", "base", "--name", "one")
    refused(base, ["virtual tokens already"], "peft", source, "--base", "one", "--name", "two")


def test_a_version_stands_wherever_a_name_does(base, tmp_path):
    base.ok(
        "hf", tiny.write_checkpoint(tmp_path / "b2", tensors=tiny.weights(CONFIG, 2)), "--name=base"
    )
    source = tiny.write_adapter(tmp_path / "ad")
    base.ok("peft", source, "--base", "base@1", "--name", "old")
    base.ok("peft", source, "--base", "base", "--name", "new")
    zoo = Zoo.open(base.zoo)
    assert [zoo.chain(n).base for n in ("old", "new")] == ["base@1", "base@2"]
    base.ok("verify", "base@1", "--against", tmp_path / "base")
    assert base("verify", "base@2", "--against", tmp_path / "base").code == 1
    base.ok("verify", "old@1", "--against", source)
    base.ok("plan", source, "--base", "base@1", "--name", "x")
    more = tiny.write_adapter(tmp_path / "more", tensors=tiny.adapter_weights(seed=3))
    base.ok("peft", more, "--base", "base@1", "--name", "more")
    base.ok("merge", "--adapter", "old@1=0.5", "--adapter", "more=0.5", "--name", "half")
    assert zoo.chain("half").base == "base@1"
    base.ok("quantize", "base@1", "--name", "small")
    base.ok("diff", "base@1", "base@2")
    refused(base, ["base@9"], "peft", source, "--base", "base@9", "--name", "x")
