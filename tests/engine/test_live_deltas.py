"""Every family with every kind of delta against transformers and peft, live, where torch is installed.

The libraries make a tiny model of random weights and adapters on it; the converter takes them in; one engine
serves the model and all its adapters in the same batches. The logits of every step, the last of a prefill
and those of decoding, agree with what the libraries compute over the same tokens, and an export is what
was converted. The fixtures hold the same, where there is no torch, for some pairs of family and kind.
"""

import dataclasses
import functools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import FIXTURES, Agent

from checkpoints import hf, peft
from checkpoints.errors import CheckpointError
from checkpoints.export import export
from checkpoints.progress import Progress
from jblock.engine.config import EngineConfig

WHY = "the live comparison needs torch, transformers and peft (tests/fixtures/README.md)"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)
pytest.importorskip("peft", reason=WHY)
sys.path.insert(0, str(FIXTURES))
# What makes the fixtures makes these too.
import cases  # noqa: E402
import make_fixtures as libraries  # noqa: E402

lib = libraries.peft
TOLERANCE = 1e-4  # of float32, as for the fixtures
TOKENS = 6
LENGTHS = (21, 3)  # of prompts
CONFIG = EngineConfig(
    max_num_seqs=8,
    max_model_len=64,
    page_size=16,
    decode_sizes=(8,),
    prefill_grids=((8, 16),),
    kv_memory_mb=8,
    adapter_slots=16,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modules:
    """What a family calls its modules; the first of each are in every layer."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    ffn: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    norms: tuple[str, ...] = ("input_layernorm", "norm")
    saved: str = "0.self_attn.o_proj"
    scaled: tuple[str, ...] = ("k_proj", "v_proj")
    embedding: str = "embed_tokens"
    head: str = "lm_head"


LLAMA = Modules()
MODULES = {
    # Experts are no modules of peft's, and what it makes of their names there is refused.
    "mixtral": dataclasses.replace(LLAMA, ffn=()),
    "qwen3_moe": dataclasses.replace(LLAMA, ffn=()),
    "gemma2": dataclasses.replace(LLAMA, norms=("input_layernorm", "post_feedforward_layernorm")),
    "gemma3": dataclasses.replace(LLAMA, norms=("input_layernorm", "q_norm", "norm")),
    "olmo2": dataclasses.replace(LLAMA, norms=("post_attention_layernorm", "k_norm", "norm")),
    "qwen3_qknorm": dataclasses.replace(LLAMA, norms=("input_layernorm", "k_norm")),
    "phi3": dataclasses.replace(
        LLAMA,
        attention=("qkv_proj", "o_proj"),
        ffn=("gate_up_proj", "down_proj"),
        scaled=("qkv_proj",),
    ),
    "gpt2": Modules(
        attention=("c_attn", "attn.c_proj"),
        ffn=("c_fc", "mlp.c_proj"),
        norms=("ln_1", "ln_f"),
        saved="0.attn.c_proj",
        scaled=("c_attn",),
        embedding="wte",
    ),
    "gpt_neox": Modules(
        attention=("query_key_value", "attention.dense"),
        ffn=("dense_h_to_4h", "dense_4h_to_h"),
        norms=("input_layernorm", "final_layer_norm"),
        saved="0.attention.dense",
        scaled=("query_key_value",),
        embedding="embed_in",
    ),
}
FAMILIES = (
    *("llama_gqa_untied", "mistral_window", "qwen2_bias", "qwen3_qknorm", "gemma2", "gemma3"),
    *("phi3", "gpt2", "gpt_neox", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe"),
)
BIASED = ("qwen2_bias", "gpt2", "gpt_neox", "qwen2_moe")
SCALED = ("gemma2", "gemma3")  # embeddings
# peft makes keys of hidden / heads columns, which are not those of the model.
NO_PREFIX = ("qwen3_qknorm", "gemma2", "gemma3", "qwen3_moe")


def adapters(family: str) -> dict[str, Any]:
    """The configs of all kinds of adapters that peft makes on a family."""
    m = MODULES.get(family, LLAMA)
    linear = [*m.attention, *m.ffn]
    tied = cases.CASES[family].fields.get("tie_word_embeddings", False)

    def lora(*targets: str, r: int = 4, **options: Any) -> Any:
        conv1d = {"fan_in_fan_out": True} if family == "gpt2" else {}
        return lib.LoraConfig(
            r=r,
            lora_alpha=8,
            target_modules=list(targets),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **conv1d | options,
        )

    patterns = {"rank_pattern": {linear[0]: 6}, "alpha_pattern": {linear[-1]: 3}}
    fields = {"task_type": "CAUSAL_LM"}
    ends = [m.ffn[-1]] if m.ffn else []
    found = {
        "lora": lora(*linear, **patterns),
        "rslora": lora(*m.attention, r=12, use_rslora=True),
        "dora": lora(*linear, use_dora=True),
        "lora_bias": lora(*m.attention, lora_bias=True),
        "embeddings": lora(m.embedding, m.attention[0], *([] if tied else [m.head])),
        "saved": lora(m.attention[0], modules_to_save=[m.head, f"1.{m.norms[0]}", m.saved]),
        "ia3": lib.IA3Config(
            target_modules=[*m.scaled, *ends],
            feedforward_modules=ends,
            fan_in_fan_out=family == "gpt2",
            **fields,
        ),
        "norms": lib.LNTuningConfig(target_modules=list(m.norms), **fields),
        "prompt": lib.PromptTuningConfig(num_virtual_tokens=5, **fields),
        "p_tuning": lib.PromptEncoderConfig(num_virtual_tokens=9, encoder_hidden_size=16, **fields),
    }
    if family in BIASED:
        found["biases"] = lora(*m.attention, bias="all")
    if family not in NO_PREFIX:
        found["prefix"] = lib.PrefixTuningConfig(num_virtual_tokens=6, **fields)
    return found


@dataclasses.dataclass
class Live:
    """A family as the libraries made and the engine served it."""

    folders: dict[str, Path]  # "" is the base
    zoo: Path
    refused: dict[str, str]
    agent: Agent
    tokens: dict[str, list[int]]  # by request
    prompts: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def live(tmp_path_factory) -> Callable[[str], Live]:
    """The Live of a family; kept until another is asked for."""
    return functools.lru_cache(1)(lambda family: serve(family, tmp_path_factory.mktemp(family)))


def serve(family: str, root: Path) -> Live:
    """Makes, converts and runs a family and its adapters."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"live {family}".encode()))
    case = cases.CASES[family]
    model = transformers.AutoModelForCausalLM.from_config(case.make_config(), dtype=torch.float32)
    libraries.fill_weights(model, generator)
    folders = {"": root / family}
    model.save_pretrained(folders[""])
    zoo, quiet, refused = root / "zoo", Progress(False), {}
    hf.convert(folders[""], zoo, family, quiet)
    for kind, config in adapters(family).items():
        torch.manual_seed(1)  # a prompt's encoder
        model = lib.get_peft_model(libraries.load(folders[""]), config)
        libraries.fill_adapter(model, generator)
        folders[kind] = root / kind
        model.save_pretrained(folders[kind])
        (folders[kind] / "README.md").unlink()
        try:
            peft.convert(folders[kind], zoo, family, kind, quiet)
        except CheckpointError as e:
            refused[kind] = str(e)
    kinds = {kind: kind or family for kind in folders if kind not in refused}
    agent = Agent.make(zoo, list(kinds.values()), CONFIG)
    prompts = {
        f"{kind} {n}": torch.randint(4, cases.VOCAB, (n,), generator=generator).numpy()
        for n in LENGTHS
        for kind in kinds
    }
    asked = {name: (kinds[name.split(" ")[0]], p) for name, p in prompts.items()}
    return Live(folders, zoo, refused, agent, agent.generate(asked, max_tokens=TOKENS), prompts)


PAIRS = [(family, kind) for family in FAMILIES for kind in ("", *adapters(family))]


@pytest.mark.parametrize(("family", "kind"), PAIRS, ids=[f"{f}-{k or 'base'}" for f, k in PAIRS])
def test_against_the_libraries(live, family: str, kind: str, tmp_path):
    live = live(family)
    if family in SCALED and kind in ("prompt", "p_tuning"):
        assert "scales its embeddings" in live.refused[kind]
        return
    assert kind not in live.refused, live.refused[kind]
    export(live.zoo, kind or family, tmp_path / "out", Progress(False))
    files = {p.name: p.read_bytes() for p in live.folders[kind].iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files

    model = libraries.load(live.folders[""])
    plain = model
    if kind:
        model = lib.PeftModel.from_pretrained(model, live.folders[kind]).eval()
        plain = libraries.load(live.folders[""])
    seen = logits_by_request(live.agent)
    for n in LENGTHS:
        name = f"{kind} {n}"
        tokens = np.concatenate([live.prompts[name], live.tokens[name][:-1]]).astype(np.int32)
        wanted = libraries.logits_of(model, tokens)[n - 1 :]
        np.testing.assert_allclose(
            seen[name], wanted, atol=TOLERANCE * max(1.0, np.abs(wanted).max() / 8), rtol=0
        )
        if kind:
            effect = np.abs(wanted - libraries.logits_of(plain, tokens)[n - 1 :]).max()
            assert effect > libraries.MIN_EFFECT, "the adapter does nothing"


def logits_by_request(agent: Agent) -> dict[str, np.ndarray]:
    """float32 [TOKENS, vocab] of every request, in the order of its positions."""
    rows: dict[str, dict[int, np.ndarray]] = {}
    for batch, logits in agent.device.seen:
        for i, item in enumerate(batch.items):
            of = rows.setdefault(item.sequence.request.request_id, {})
            of[item.start + item.q_len - 1] = logits[i]
    return {name: np.stack([of[p] for p in sorted(of)][-TOKENS:]) for name, of in rows.items()}
