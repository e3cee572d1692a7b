"""Whole models against transformers, live, where torch is installed: random weights, every position."""

import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.blocks.attention import Attention
from jblock.blocks.embedding import Embedding, Head
from jblock.blocks.ffn import Ffn
from jblock.blocks.platform import here
from jblock.blocks.rows import Rows
from jblock.engine.weights import params as parameters
from jblock.pallas_kernels.paged_attention.reference import attention
from jblock.zoo.store import Zoo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 40
DIMS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
CASES = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2_scaled": transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
    "neox_parallel": transformers.GPTNeoXConfig(**DIMS),
    "neox_sequential": transformers.GPTNeoXConfig(**DIMS, use_parallel_residual=False),
    "llama_yarn": transformers.LlamaConfig(**DIMS, rope_parameters=YARN | {"rope_theta": 1e4}),
}


@pytest.mark.parametrize("name", CASES)
def test_against_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CASES[name], dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape))
        ids = torch.randint(4, 64, (1, LENGTH))
        wanted = model(input_ids=ids, use_cache=False).logits[0].numpy()
    # Special tokens of the default config lie outside of so small a vocabulary.
    model.config.bos_token_id = model.config.eos_token_id = model.config.pad_token_id = 1
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = 1
    model.save_pretrained(tmp_path / "source")
    chain, _ = hf.convert(tmp_path / "source", tmp_path / "zoo", name, Progress(False))
    got = forward(Zoo.open(tmp_path / "zoo"), chain, ids[0].numpy())
    np.testing.assert_allclose(got, wanted, atol=1e-4 * max(1.0, np.abs(wanted).max()))


def forward(zoo, chain, ids):
    """Logits of every position, block by block, without cache and batch."""
    rows = Rows(
        num_seqs=1,
        q_len=len(ids),
        starts=jnp.zeros(1, jnp.int32),
        q_lens=jnp.full(1, len(ids), jnp.int32),
        slots=jnp.zeros(1, jnp.int32),
    )
    parts = []
    for step in chain.steps:
        record = zoo.component(step.component)
        stored = zoo.load_component(step.component)
        parts.append((record.spec, parameters.prepare(record.spec, stored, "float32", False)))
    (first, table), *layers, (norm, scale), (head, weight) = parts
    x = Embedding(first, table, "float32")(jnp.asarray(ids, jnp.int32), rows.positions[0])
    source = None
    for spec, tensors in layers:
        if spec.kind == "attention":

            def attend(q, k, v, spec=spec):
                return jnp.asarray(attention(q[0], k[0], v[0], 0, None, spec.softcap, spec.scale))[
                    None
                ]

            block = Attention(spec, tensors, {})
            source = block.ffn_source(x, rows)
            x = block(x, rows, attend)
        else:
            x = Ffn(spec, tensors, {})(x, rows, source)
    return np.asarray(Head((norm, head), (scale, weight), here(), tied=False)(x))
