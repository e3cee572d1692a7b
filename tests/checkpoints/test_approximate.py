"""equivalence, stitch and surrogate from the command line: measured in place, published apart, resumable."""

import json

import jax
import numpy as np
import pytest
import tiny_checkpoints as tiny
from jax.experimental.compilation_cache import compilation_cache

from jblock.adapt import forward, frozen, surrogates, training, training_state
from jblock.zoo import edges
from jblock.zoo.fsck import fsck
from jblock.zoo.store import Zoo

WIDE = tiny.CONFIG | {"hidden_size": 24}


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Training the same again does not compile again."""
    wanted = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def scaled(config, seed=0):
    """Weights that give sensible logits."""
    tensors = tiny.weights(config, seed)
    return {n: v * (0.3 if v.ndim == 2 else 0.1) + (v.ndim == 1) for n, v in tensors.items()}


def convert(cli, path, name, config, tensors):
    source = tiny.write_checkpoint(path / name, config, tensors)
    (source / "tokenizer.json").write_text(tiny.tokenizer_json())
    cli.ok("hf", source, "--name", name)


@pytest.fixture
def words(tmp_path):
    """Text, and items: the next of four words that go round."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 4, 4000)
    text = " ".join(f"w{3 + (s + i) % 4}" for i, s in enumerate(starts))
    (tmp_path / "text.txt").write_text(text)
    items = [{"prompt": f"w{3 + i % 4} w9", "answer": f"w{3 + (i + 1) % 4}"} for i in range(40)]
    lines = [json.dumps(i | {"stop": i["answer"] == "w3"}) for i in items]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def pair(cli, words):
    convert(cli, words, "small", tiny.CONFIG, scaled(tiny.CONFIG))
    convert(cli, words, "wide", WIDE, scaled(WIDE, 1))
    return cli


def files(words, steps=6):
    text, items = words / "text.txt", words / "items.jsonl"
    options = ["--train", text, "--text", text, "--items", items, "--steps", steps]
    return [*options, "--tokens", 512, "--row_tokens", 64, "--batch_tokens", 256, "--json"]


@pytest.mark.long
def test_one_stitch_joins_at_two_depths_and_a_kill_changes_nothing(pair, words, monkeypatch):
    command = [
        "stitch",
        "small",
        "wide",
        "--at",
        "1:1",
        "--at",
        "2:1",
        "--name",
        "j",
        *files(words),
    ]
    straight = json.loads(pair.ok(*command))
    assert [m["name"] for m in straight["models"]] == ["j-1-1@1", "j-2-1@1"]
    zoo = Zoo.open(pair.zoo)
    one, other = zoo.chain("j-1-1"), zoo.chain("j-2-1")
    assert one.policy == other.policy == "adaptive"
    assert straight["stitch"] == one.steps[3].component == other.steps[5].component
    for model in straight["models"]:
        assert model["beside"].keys() == {"small", "wide"}
        assert model["beside"]["small"]["accuracy_change"]["count"] == 40
    found = {e.id: e for e in edges.edges(zoo)}
    assert {one.derived["edge"], other.derived["edge"]} == found.keys()
    for edge in found.values():
        assert (edge.kind, edge.chain) == ("stitch", "wide@1")
        assert {"kl", "top1_agreement", "perplexity_change", "accuracy_change"} <= set(edge.scores)
    assert fsck(zoo) == []

    # The same again, killed half way: the state is kept and the end is the same.
    for path in (pair.zoo / "edges").iterdir():
        path.unlink()
    for name in ("j-1-1", "j-2-1"):
        pair.ok("rm", name)
    pair.ok("gc", "--delete")
    write, kept = training_state.write, []

    def write_then_die(work, done, arrays):
        write(work, done, arrays)
        kept.append(done)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training_state, "write", write_then_die)
    monkeypatch.setenv("XDG_CACHE_HOME", str(pair.zoo.parent / "cache"))
    states = pair.zoo.parent / "cache/jblock/training"
    assert pair(*command).code == 130
    assert len(list(states.glob("*.npz"))) == 1
    again = json.loads(pair.ok(*command))
    assert kept == [1, 2, 3, 4, 5, 6]  # went on where it was
    assert again["stitch"] == straight["stitch"]
    assert not list(states.glob("*.npz"))


def test_between_layers_of_one_model_least_squares_leave_nearly_nothing_to_train(cli, words):
    convert(cli, words, "small", tiny.CONFIG, scaled(tiny.CONFIG))
    command = ["stitch", "small", "small", "--at", "1:1", "--name", "same", "--learning_rate", 1e-6]
    (model,) = json.loads(cli.ok(*command, *files(words, 1)))["models"]
    assert model["beside"]["small"]["kl"]["value"] < 1e-3


def test_a_surrogate_is_smaller_and_nearer_than_what_was_only_pruned(pair, words):
    def kl(steps, to):
        result = json.loads(
            pair.ok("surrogate", "small", "--layers", "1:2", "--keep", 0.5, "--as", to,
                    "--learning_rate", 0.01, *files(words, steps))
        )  # fmt: skip
        counts = result["parameters"]
        assert 0.3 < counts["surrogate"] / counts["original"] <= 0.5
        return result["models"][0]["beside"]["small"]["kl"]["value"]

    assert kl(60, "trained") < 0.8 * kl(1, "pruned")
    zoo = Zoo.open(pair.zoo)
    small, trained = zoo.chain("small"), zoo.chain("trained")
    assert trained.policy == "adaptive" and trained.steps[:3] == small.steps[:3]
    weights = forward.load(zoo, trained.steps)
    assert weights.specs[3].num_heads < forward.load(zoo, small.steps).specs[3].num_heads
    assert fsck(zoo) == []


def test_equal_directions_of_other_length_are_no_substitutes(cli, words):
    """Cosine 1 twice over: the one changes nothing that comes out, the other nearly all."""
    base = scaled(tiny.CONFIG)
    same, longer = dict(base), dict(base)
    name = "model.layers.1.mlp.down_proj.weight"
    noise = 1e-4 * np.random.default_rng(5).standard_normal(base[name].shape)
    same[name] = (base[name] + noise).astype(np.float32)
    part = "model.layers.0."
    longer |= {n: v * 4 for n, v in base.items() if n.startswith(part + "self_attn")}
    longer[part + "input_layernorm.weight"] = base[part + "input_layernorm.weight"] * 4
    for model, tensors in (("base", base), ("same", same), ("longer", longer)):
        convert(cli, words, model, tiny.CONFIG, tensors)
    convert(cli, words, "mate", tiny.CONFIG | {"rope_theta": 5000.0}, base)
    ask = ["equivalence", "--text", words / "text.txt", "--items", words / "items.jsonl"]
    ask += ["--tokens", 512, "--row_tokens", 64, "--policy", "near", "--json"]
    alone = json.loads(cli.ok(*ask, "--threshold", "parameter_cosine=0.99"))
    assert not any(e["usable"] for e in alone["edges"]) and not alone["recommended"]

    found = json.loads(cli.ok(*ask, "--threshold", "kl=0.01", "--suffix", ".near"))
    cosine = {e["chain"]: e["scores"]["parameter_cosine"]["value"] for e in found["edges"]}
    assert cosine["same@1"] > 0.9999 and cosine["longer@1"] > 0.99
    assert {e["chain"]: e["usable"] for e in found["edges"]} == {"same@1": True, "longer@1": False}
    (row,) = found["recommended"]
    assert row["published"] == "same.near@1"
    zoo = Zoo.open(cli.zoo)
    assert zoo.chain("same.near").steps == zoo.chain("base").steps
    assert zoo.chain("same.near").policy == "near"
    assert found["freed_bytes"] == zoo.component(zoo.chain("same").steps[4].component).nbytes
    assert fsck(zoo) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stitch", "small", "wide", "--at", "3:1", "--name", "j"], "give 1 to 2 layers of small"),
        (["stitch", "small", "wide", "--at", "1", "--name", "j"], "give K:J"),
        (["stitch", "small", "wide", "--at", "1:0", "--at", "1:1", "--name", "j"], "once"),
        (["surrogate", "small", "--layers", "1:3", "--as", "s"], "within 0:2"),
        (["surrogate", "small", "--layers", "0:1", "--keep", "0.01", "--as", "s"], "not even one head"),
        (["surrogate", "small", "--layers", "0:1", "--keep", "2", "--as", "s"], "between 0 and 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(pair, words, argv, message):
    result = pair(*argv, *files(words))
    assert (result.code, message in result.err) == (2, True), result.err


def test_other_tokens_and_bad_files_are_refused(pair, words):
    source = tiny.write_checkpoint(words / "other", WIDE, scaled(WIDE, 3))
    pair.ok("hf", source, "--name", "mute")
    assert (
        "tokenizers"
        in pair("stitch", "small", "mute", "--at", "1:1", "--name", "j", *files(words)).err
    )
    (words / "items.jsonl").write_text('{"prompt": "w3"}\n')
    assert "items.jsonl:1" in pair("equivalence", "--cosine", -0.9, *files(words)[2:6]).err
    assert "--cosine 3" in pair("equivalence", "--cosine", 3).err


def test_pruning_keeps_the_heads_and_channels_that_matter():
    from jblock.blocks.spec import AttentionSpec

    spec = AttentionSpec(
        hidden_size=8, num_heads=4, num_kv_heads=2, head_dim=4, norm_eps=1e-5, rope=None
    )
    (small,) = surrogates.smaller([spec], 0.7)
    assert (small.num_heads, small.num_kv_heads) == (2, 2)
    tensors = {n: np.random.default_rng(0).standard_normal(s) for n, s in spec.tensors().items()}
    kept = surrogates.prune(spec, small, tensors, np.array([0.1, 0.2, 0.9, 0.3]))
    rows = [4, 5, 6, 7, 8, 9, 10, 11]  # heads 1 and 2, one of each group
    np.testing.assert_allclose(kept["q.weight"], tensors["q.weight"][rows], rtol=1e-6)
    np.testing.assert_allclose(kept["o.weight"], tensors["o.weight"][:, rows], rtol=1e-6)
    np.testing.assert_allclose(kept["k.weight"], tensors["k.weight"], rtol=1e-6)
    assert {n: v.shape for n, v in kept.items()} == small.tensors()


def test_models_of_another_width_are_compared_by_what_they_put_out(pair, words):
    ask = ["equivalence", "small", *files(words)[2:6], "--tokens", 512, "--row_tokens", 64]
    ask += ["--policy", "near", "--json", "--threshold"]
    found = json.loads(pair.ok(*ask, "kl=1e-6"))
    (edge,) = found["edges"]
    zoo = Zoo.open(pair.zoo)
    ids = [step["component"] for step in edge["substitute"]]
    assert ids == [step.component for step in zoo.chain("wide").steps]
    assert (
        edge["scores"].keys() >= {"kl", "accuracy_change"} and "hidden_error" not in edge["scores"]
    )
    assert not edge["usable"] and not found["recommended"]
    # A user who accepts anything gets it as a whole.
    found = json.loads(pair.ok(*ask, "kl=100", "--suffix", ".near"))
    (row,) = found["recommended"]
    assert row["steps"] is None
    assert Zoo.open(pair.zoo).chain("small.near").steps == zoo.chain("wide").steps


def test_measure_says_how_far_two_models_are_apart_and_keeps_it(pair, words):
    pair.ok("quantize", "small", "--bits", 8, "--group", 8)
    ask = ["measure", "small-int8", "--against", "small", *files(words)[2:6]]
    ask += ["--tokens", 512, "--row_tokens", 64, "--json"]
    data = json.loads(pair.ok(*ask, "--policy", "near", "--threshold", "kl=0.1"))
    assert (data["kind"], data["against"], data["usable"]) == ("quantized", "small@1", True)
    assert 0 < data["scores"]["kl"]["value"] < 0.1
    assert data["scores"]["accuracy_change"]["count"] == 40
    zoo = Zoo.open(pair.zoo)
    edge = edges.edge(zoo, data["edge"])
    assert (
        edge.substitute == zoo.chain("small-int8").steps[1:-2]
    )  # from the first change to the last
    far = json.loads(pair.ok(*[a if a != "small-int8" else "wide" for a in ask]))
    assert far["kind"] == "equivalent" and "needs policy near" in far["reasons"][0]
    assert far["scores"]["kl"]["value"] > data["scores"]["kl"]["value"]
    same = pair(*[a if a != "small-int8" else "small@1" for a in ask])
    assert same.code == 2 and "the same components" in same.err
    assert fsck(zoo) == []


def test_compress_says_what_is_lost_of_the_change_and_what_that_costs(cli, words):
    """A change of a hundredth of the weights, of which low rank loses much: little of the weights."""
    base = scaled(tiny.CONFIG)
    rng = np.random.default_rng(3)
    tuned = {
        n: (v + 0.01 * v.std() * rng.standard_normal(v.shape)).astype(np.float32)
        if ".layers.1." in n and v.ndim == 2
        else v
        for n, v in base.items()
    }
    convert(cli, words, "base", tiny.CONFIG, base)
    convert(cli, words, "tuned", tiny.CONFIG, tuned)
    result = cli("compress", "tuned", "--base", "base", "--budget", 0.4, "--codec", "low_rank",
                 *files(words)[2:6], "--tokens", 512, "--row_tokens", 64, "--json")  # fmt: skip
    assert "encoding about" in result.err and "beside tuned: about" in result.err
    made = json.loads(result.out)
    assert 0.3 < made["change_error"] < 1
    scores = made["measured"]["scores"]
    assert scores["change_error"]["value"] == made["change_error"]
    assert 0 < scores["kl"]["value"] < 0.01 and scores["accuracy_change"]["count"] == 40
    data = json.loads(
        cli.ok("list", "--edges", "--policy", "near", "--threshold", "kl=0.05", "--json")
    )
    assert [e["id"] for e in data["edges"] if e["usable"]] == [made["measured"]["edge"]]


def test_adapters_are_measured_merged_or_left_out_and_said(pair, words):
    """DoRA whose magnitudes are the norms and whose B is zero changes nothing; twice as large, all."""
    weights = scaled(tiny.CONFIG)
    lora = {n: v if "lora_A" in n else 0 * v for n, v in tiny.adapter_weights().items()}
    norms = {
        n.replace("lora_A.weight", "lora_magnitude_vector"): np.linalg.norm(
            weights[n.removeprefix("base_model.model.").replace("lora_A.weight", "weight")], axis=1
        )
        for n in lora
        if "lora_A" in n
    }
    config = tiny.ADAPTER | {"use_dora": True}
    for name, scale in (("same", 1), ("twice", 2)):
        tensors = lora | {n: scale * v for n, v in norms.items()}
        pair.ok("peft", tiny.write_adapter(words / name, config, tensors), "--base", "small")
    prompt = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    rows = {"prompt_embeddings": np.ones((4, 16), np.float32)}
    pair.ok("peft", tiny.write_adapter(words / "prompt", prompt, rows), "--base", "small")
    ask = [*files(words)[2:6], "--tokens", 512, "--row_tokens", 64, "--json"]
    kl = {
        name: json.loads(pair.ok("measure", name, "--against", "small", *ask))["scores"]["kl"]
        for name in ("same", "twice")
    }
    assert abs(kl["same"]["value"]) < 1e-6 and kl["twice"]["value"] > 0.01
    assert "cannot be merged" in pair("measure", "prompt", "--against", "small", *ask).err
    found = json.loads(pair.ok("equivalence", *ask))
    assert found["skipped"] == []  # by default adapters are left to their base
    found = json.loads(pair.ok("equivalence", "twice", "prompt", *ask))
    assert [s["chain"] for s in found["skipped"]] == ["prompt@1"]
    assert {e["chain"] for e in found["edges"]} == {"twice@1"}


def test_layers_that_are_not_kept_in_memory_give_the_same(pair, words, monkeypatch):
    command = ["surrogate", "small", "--layers", "0:1", "--keep", 0.5, *files(words, 3)]
    kept = json.loads(pair.ok(*command, "--as", "kept"))
    monkeypatch.setattr(frozen, "_KEPT_BYTES", 0)
    monkeypatch.setattr(frozen, "_KEPT_LAYERS", 0)
    read = json.loads(pair.ok(*command, "--as", "read"))
    zoo = Zoo.open(pair.zoo)
    assert zoo.chain("kept").steps == zoo.chain("read").steps
    assert kept["models"][0]["perplexity"] == read["models"][0]["perplexity"]
