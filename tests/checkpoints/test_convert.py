"""A checkpoint becomes a chain: bit by bit the same, shared where equal, tied where tied."""

import json

import child_runs
import numpy as np
import pytest
import safetensors.numpy
import tiny_checkpoints as tiny
from tiny_checkpoints import ADAPTER, CONFIG

from jblock.blocks.delta_spec import LoraTarget
from jblock.zoo.store import Zoo

QWEN3 = CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 8}
QWEN2 = CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = CONFIG | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 8,
}


def inspect(cli, *argv):
    return json.loads(cli.ok("inspect", *argv, "--json"))


@pytest.mark.parametrize(
    ("config", "dtype", "shards"),
    [
        (CONFIG, np.float32, 1),
        (CONFIG, tiny.BFLOAT16, 3),
        (CONFIG | {"tie_word_embeddings": True}, np.float16, 1),
        (MISTRAL, np.float32, 1),
        (QWEN2, np.float32, 2),
        (QWEN3, tiny.BFLOAT16, 1),
    ],
)
def test_every_bit_arrives(tmp_path, cli, config, dtype, shards):
    tensors = tiny.weights(config, dtype=dtype)
    source = tiny.write_checkpoint(tmp_path / "src", config, tensors, shards)
    assert cli.ok("hf", source, "--name", "m") == "m@1 added\n"
    assert cli.ok("verify", "m", "--against", source) == f"m is {source}\n"
    assert cli.ok("fsck").endswith("clean\n")

    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain("m")
    kinds = [zoo.component(s.component).spec.kind for s in chain.steps]
    assert kinds == ["embedding", *["attention", "ffn"] * tiny.LAYERS, "norm", "unembedding"]
    q = zoo.load_component(chain.steps[1].component, verify=True)["q.weight"]
    assert q.tobytes() == tensors["model.layers.0.self_attn.q_proj.weight"].tobytes()
    assert chain.source == config
    # Read by another library, the same: the zoo is not readable by this code only.
    params = cli.zoo / "components" / chain.steps[1].component / "params.safetensors"
    again = safetensors.numpy.load_file(params)
    assert np.asarray(again["q.weight"]).tobytes() == q.tobytes()


def test_a_tied_head_is_a_reference(tmp_path, cli):
    config = CONFIG | {"tie_word_embeddings": True}
    plain = tiny.weights(config)
    copied = plain | {"lm_head.weight": plain["model.embed_tokens.weight"].copy()}
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "a", config, plain), "--name", "a")
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "b", config, copied), "--name", "b")
    zoo = Zoo.open(cli.zoo)
    embedding, head = zoo.chain("a").steps[0].component, zoo.chain("a").steps[-1].component
    assert zoo.component(head).refs == {"weight": (embedding, "weight")}
    assert zoo.component(head).nbytes == 0
    assert (zoo.load_component(head)["weight"] == plain["model.embed_tokens.weight"]).all()
    assert zoo.chain("b").steps == zoo.chain("a").steps


def test_a_fine_tune_adds_only_what_it_changed(tmp_path, cli):
    config = CONFIG | {"num_hidden_layers": 6}
    base = tiny.weights(config)
    tuned = dict(base)
    added = 0
    for i in (4, 5):  # two thirds of the layers are frozen
        for name in [n for n in base if n.startswith(f"model.layers.{i}.")]:
            tuned[name] = base[name] + 1
            added += tuned[name].nbytes
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base", config, base), "--name", "base")
    before = inspect(cli)["totals"]
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "tuned", config, tuned), "--name", "tuned")
    after = inspect(cli)["totals"]

    assert before["stored_bytes"] == sum(t.nbytes for t in base.values())
    assert after["stored_bytes"] - before["stored_bytes"] == added
    assert after["components"] - before["components"] == 4
    assert after["logical_bytes"] == 2 * before["logical_bytes"]
    chain = inspect(cli, "tuned")["chains"][0]
    assert chain["own_bytes"] == added
    used = [c["used_by"] for c in inspect(cli, "tuned")["components"]]
    assert used.count(["tuned@1"]) == 4
    assert used.count(["base@1", "tuned@1"]) == len(used) - 4


def test_the_same_again_is_no_new_version(tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "src")
    cli.ok("hf", source, "--name", "m")
    files = tiny.files_of(cli.zoo)
    assert cli.ok("hf", source, "--name", "m") == "m@1 unchanged\n"
    assert tiny.files_of(cli.zoo) == files
    other = tiny.write_checkpoint(tmp_path / "other", tensors=tiny.weights(CONFIG, seed=1))
    assert cli.ok("hf", other, "--name", "m") == "m@2 added\n"
    assert cli.ok("hf", source, "--name", "m") == "m@1 unchanged\n"
    assert Zoo.open(cli.zoo).active("m") == 1  # what was asked for last is active


def test_token_ids_and_sampling_come_from_generation_config_first(tmp_path, cli):
    generation = {"eos_token_id": [2, 3], "temperature": 0.6, "top_p": 0.9, "_from_model": True}
    source = tiny.write_checkpoint(tmp_path / "src", generation=generation)
    (source / "tokenizer.json").write_text(tiny.tokenizer_json())
    (source / "chat_template.jinja").write_text("{{ messages }}")
    cli.ok("hf", source, "--name", "m")
    zoo = Zoo.open(cli.zoo)
    chain = zoo.chain("m")
    assert (chain.eos_token_ids, chain.bos_token_id) == ((2, 3), 1)
    assert chain.generation == {"temperature": 0.6, "top_p": 0.9}
    assert (chain.max_position, chain.vocab_size) == (64, 32)
    stored = zoo.tokenizer_path(chain.tokenizer)
    names = sorted(p.name for p in stored.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    with_it = zoo.folder("sources", chain.tokenizer_files)
    assert "chat_template.jinja" in {p.name for p in with_it.iterdir()}
    kept = zoo.folder("sources", chain.source_files)
    names = sorted(p.name for p in kept.iterdir())
    assert names == [
        "config.json",
        "generation_config.json",
        "model.safetensors.header",
        "tokenizer_files.json",
    ]
    raw = (source / "model.safetensors").read_bytes()
    header = (kept / "model.safetensors.header").read_bytes()
    assert raw[8 : 8 + len(header)] == header


def test_an_adapter_adds_deltas_to_shared_components(tmp_path, cli):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    before = inspect(cli)["totals"]
    tensors = tiny.adapter_weights()
    source = tiny.write_adapter(tmp_path / "adapter", tensors=tensors)
    assert cli.ok("peft", source, "--base", "base", "--name", "a") == "a@1 on base@1 added\n"
    assert cli.ok("verify", "a", "--against", source) == f"a is {source}\n"
    assert cli.ok("fsck").endswith("clean\n")
    after = inspect(cli)["totals"]
    assert after["components"] == before["components"]
    added = sum(t.nbytes for t in tensors.values())
    assert after["stored_bytes"] - before["stored_bytes"] == added

    zoo = Zoo.open(cli.zoo)
    base, chain = zoo.chain("base"), zoo.chain("a")
    assert [s.component for s in chain.steps] == [s.component for s in base.steps]
    assert [len(s.deltas) for s in chain.steps] == [0, 1, 1, 1, 1, 0, 0]
    assert (chain.base, chain.adapter) == ("base@1", ADAPTER)
    delta = zoo.delta(chain.steps[1].deltas[0])
    assert delta.spec.targets == {
        "q": LoraTarget(rank=4, scale=2.0),
        "v": LoraTarget(rank=4, scale=2.0),
    }
    loaded = zoo.load_delta(delta.id, verify=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert (loaded["q.a"] == tensors[name]).all()
    assert cli.ok("peft", source, "--base", "base", "--name", "a").endswith("unchanged\n")


def test_rank_and_alpha_patterns(tmp_path, cli):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "base"), "--name", "base")
    config = ADAPTER | {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"down_proj": 32},
        "use_rslora": True,
    }
    tensors = tiny.adapter_weights()
    prefix = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    tensors[prefix + "A.weight"] = tensors[prefix + "A.weight"][:2]
    tensors[prefix + "B.weight"] = tensors[prefix + "B.weight"][:, :2]
    source = tiny.write_adapter(tmp_path / "adapter", config, tensors)
    cli.ok("peft", source, "--base", "base", "--name", "a")
    zoo = Zoo.open(cli.zoo)
    steps = zoo.chain("a").steps
    assert zoo.delta(steps[1].deltas[0]).spec.targets["q"] == LoraTarget(rank=4, scale=4.0)
    assert zoo.delta(steps[3].deltas[0]).spec.targets["q"] == LoraTarget(rank=2, scale=8 / 2**0.5)
    assert zoo.delta(steps[2].deltas[0]).spec.targets["down"] == LoraTarget(rank=4, scale=16.0)


def test_verify_names_what_differs(tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "src")
    cli.ok("hf", source, "--name", "m")
    tensors = tiny.weights(CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(np.uint32)[3, 5] ^= 1  # one bit
    tiny.write_checkpoint(source, CONFIG | {"eos_token_id": 3}, tensors)
    result = cli("verify", "m", "--against", source)
    assert result.code == 1
    assert result.out.splitlines()[:2] == ["config.json differs", f"tensor {name!r} differs"]


def test_memory_is_one_component_and_a_little(tmp_path):
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6}
    source = tiny.write_checkpoint(tmp_path / "src", config)
    largest = 3 * 512 * 1536 * 4
    whole = (source / "model.safetensors").stat().st_size
    warm = tiny.write_checkpoint(tmp_path / "warm")
    grown = child_runs.grown_bytes(
        ("hf", warm, "--zoo", tmp_path / "zoo", "--name", "warm"),
        ("hf", source, "--zoo", tmp_path / "zoo", "--name", "m"),
    )
    assert grown < largest + (24 << 20) < whole / 2


def test_list_names_the_models(tmp_path, cli):
    cli.ok("hf", tiny.write_checkpoint(tmp_path / "src"), "--name", "some-model")
    assert "some-model@1" in cli.ok("list")
    shown = cli.ok("inspect", "some-model")
    assert shown.startswith("some-model@1: llama, policy exact")
    assert "blocks" in shown
    assert "attention" not in shown
    assert "attention" in cli.ok("inspect", "some-model", "--details")


def test_progress_is_drawn_when_asked(tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "src")
    assert "components" in cli("hf", source, "--name", "m", "--progress").err
    assert cli("hf", source, "--name", "m", "--quiet").err == ""


def test_generation_fields_that_nothing_reads_are_named(tmp_path, cli):
    generation = {"eos_token_id": 2, "top_k": 20, "num_beams": 4, "no_repeat_ngram_size": 0}
    generation |= {"stop_strings": ["x"], "forced_eos_token_id": 2, "transformers_version": "5"}
    source = tiny.write_checkpoint(tmp_path / "src", generation=generation)
    said = cli("hf", source, "--name", "m").err
    assert "3 fields are ignored" in said
    assert "forced_eos_token_id, num_beams, stop_strings" in said
