"""Fine-tunes the upper layers of a Llama checkpoint for one of the generated tasks.

  python -m examples.train.tune_checkpoint --checkpoint SMOLLM2_135M --task spell --first_layer 24 --out DIR

Reads a Hugging Face folder (config.json, model.safetensors, tokenizer.json) and writes another one that
differs in the layers from `--first_layer` on, so that a zoo shares all others. The frozen layers run once
over the training items; a step is the trained layers and the head alone. Seeded. A model of 135M
parameters takes about ten minutes on two cores.
"""

import functools
import json
import os
import pathlib
import random
import shutil
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import app, flags, logging
from safetensors import numpy as safetensors_numpy

from examples.train import model as llama
from examples.train import tasks

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the base.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_TASK = flags.DEFINE_enum("task", "spell", sorted(tasks.TASKS), "What to learn.")
_FIRST = flags.DEFINE_integer("first_layer", 24, "The lowest layer that is trained.")
_STEPS = flags.DEFINE_integer("steps", 300, "Training ends after so many, or at --target.")
_ITEMS = flags.DEFINE_integer("train_items", 800, "Different items to train on.")
_TARGET = flags.DEFINE_float("target", 0.97, "Ends at this share of exact validation items.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of items and batches.")

_LEARNING_RATE = 5e-4
_BATCH = 16  # items of a step
_CHECK_EVERY = 25
_VALIDATION_ITEMS = 128
_TRUNK_ROWS = 128  # items that go through the frozen layers at once


def read_config(folder: pathlib.Path) -> llama.Config:
    """Dimensions of a Llama checkpoint.

    Raises:
      ValueError: another architecture, or scaled rotary positions.
    """
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if data.get("model_type") != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: give a Llama checkpoint with plain rotary positions")
    heads = data["num_attention_heads"]
    return llama.Config(
        vocab_size=data["vocab_size"],
        hidden_size=data["hidden_size"],
        num_layers=data["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=data.get("num_key_value_heads", heads),
        head_dim=data.get("head_dim") or data["hidden_size"] // heads,
        ffn_size=data["intermediate_size"],
        tied=data.get("tie_word_embeddings", False),
        max_positions=data["max_position_embeddings"],
        rope_theta=rope.get("rope_theta") or data["rope_theta"],
        norm_eps=data["rms_norm_eps"],
    )


def encode_items(
    tokenizer: tokenizers.Tokenizer, items: list[tasks.Item], bos: int | None, eos: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """`tokens` `(B, width)` int32 (bos where the tokenizer puts one, prompt, answer, eos, padding) and
    `target` `(B, width)` bool, True on the answer and its eos."""
    tokens = np.full((len(items), width), eos, np.int32)
    target = np.zeros((len(items), width), bool)
    for row, item in enumerate(items):
        prompt = tokenizer.encode(item.prompt).ids
        answer = [*tokenizer.encode(item.answer, add_special_tokens=False).ids, eos]
        ids = [*prompt, *answer]
        if len(ids) > width:
            raise ValueError(f"{item.prompt!r} takes {len(ids)} tokens, more than {width}")
        tokens[row, : len(ids)] = ids
        target[row, len(prompt) : len(ids)] = True
    return tokens, target


def trunk_rows(
    config: llama.Config, params: llama.Params, tokens: np.ndarray, first: int
) -> np.ndarray:
    """Hidden states `(B, T, D)` float32 below layer `first`."""

    @jax.jit
    def run(params: llama.Params, tokens: jax.Array) -> jax.Array:
        return llama.layers(config, params, params[llama.EMBEDDING][tokens], 0, first)

    size = min(_TRUNK_ROWS, len(tokens))
    parts = []
    for begin in range(0, len(tokens), size):
        at = np.arange(begin, begin + size) % len(tokens)  # all of one shape: one program
        parts.append(np.asarray(run(params, tokens[at])))
    return np.concatenate(parts)[: len(tokens)]


def _answer_logits(config, params, x, tokens, target, first, most):
    """Logits `(B, most, V)` of the positions that predict a target token, the ids `(B, most)` they should
    predict, and which of them count."""
    x = llama.layers(config, params, x, first, config.num_layers)[:, :-1]
    # The targets of a row are one run; so much of the head as the longest of them needs is computed.
    start = jnp.argmax(target[:, 1:], axis=1)
    at = jnp.minimum(start[:, None] + jnp.arange(most), x.shape[1] - 1)
    x = jnp.take_along_axis(x, at[..., None], axis=1)
    wanted = jnp.take_along_axis(tokens[:, 1:], at, axis=1)
    counts = jnp.arange(most) < jnp.sum(target, axis=1)[:, None]
    return llama.head(config, params, x), wanted, counts


def tune(
    config: llama.Config,
    params: llama.Params,
    tokenizer: tokenizers.Tokenizer,
    bos: int | None,
    eos: int,
) -> llama.Params:
    """Trains the upper layers on the task; returns them, rounded to bfloat16."""
    task, first, rng = tasks.TASKS[_TASK.value], _FIRST.value, random.Random(_SEED.value)
    items = tasks.distinct_items(task, _SEED.value, "train", _ITEMS.value)
    held = tasks.distinct_items(task, _SEED.value, "validation", _VALIDATION_ITEMS)
    longest = max(len(tokenizer.encode(i.prompt + i.answer).ids) + 2 for i in (*items, *held))
    width = -(-longest // 4) * 4
    trained = {
        n: v
        for n, v in params.items()
        if n.startswith("model.layers.") and int(n.split(".")[2]) >= first
    }
    fixed = {n: v for n, v in params.items() if n not in trained}
    sets = []
    for some in (items, held):
        tokens, target = encode_items(tokenizer, some, bos, eos, width)
        sets.append((trunk_rows(config, params, tokens, first), tokens, target))
        logging.info("%d items went through the frozen layers", len(some))
    most = max(int(target.sum(axis=1).max()) for _, _, target in sets)

    def loss(trained, fixed, x, tokens, target):
        logits, wanted, counts = _answer_logits(
            config, {**fixed, **trained}, x, tokens, target, first, most
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return jnp.sum(losses * counts) / jnp.sum(counts)

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, _LEARNING_RATE, 20, _STEPS.value, 0.05 * _LEARNING_RATE
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))
    state = optimizer.init(trained)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(trained, state, fixed, x, tokens, target):
        value, gradients = jax.value_and_grad(loss)(trained, fixed, x, tokens, target)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    @jax.jit
    def hits(trained, fixed, x, tokens, target):
        logits, wanted, counts = _answer_logits(
            config, {**fixed, **trained}, x, tokens, target, first, most
        )
        return jnp.all((jnp.argmax(logits, -1) == wanted) | ~counts, axis=1)

    def batches() -> Iterator[list[int]]:
        while True:
            order = rng.sample(range(len(items)), len(items))
            for begin in range(0, len(items) - _BATCH + 1, _BATCH):
                yield order[begin : begin + _BATCH]

    trained = jax.tree.map(jnp.array, trained)
    for step, at in zip(range(1, _STEPS.value + 1), batches(), strict=False):
        trained, state, value = step_fn(trained, state, fixed, *(a[at] for a in sets[0]))
        if step % _CHECK_EVERY == 0 or step == _STEPS.value:
            rounded = {n: v.astype(jnp.bfloat16).astype(jnp.float32) for n, v in trained.items()}
            exact = np.concatenate(
                [
                    np.asarray(hits(rounded, fixed, *(a[b : b + 64] for a in sets[1])))
                    for b in range(0, len(held), 64)
                ]
            ).mean()
            logging.info("step %d: loss %.4f, %.4f of validation exact", step, value, exact)
            if exact >= _TARGET.value:
                break
    return {n: v.astype(jnp.bfloat16) for n, v in trained.items()}


def write(base: pathlib.Path, out: pathlib.Path, trained: llama.Params) -> None:
    """The base's folder with the trained tensors, in the dtype that the base stores them in."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = safetensors_numpy.load_file(base / "model.safetensors")
    for name, value in trained.items():
        tensors[name] = np.asarray(value.astype(jnp.float32)).astype(tensors[name].dtype)
    safetensors_numpy.save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for path in base.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copy(path, out / path.name)


def main(argv: list[str]) -> None:
    """Trains and writes the fine-tune."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    base = pathlib.Path(_CHECKPOINT.value)
    config = read_config(base)
    if not 0 < _FIRST.value < config.num_layers:
        raise app.UsageError(f"--first_layer: give 1 to {config.num_layers - 1}")
    raw = json.loads((base / "config.json").read_text(encoding="utf-8"))
    eos = raw["eos_token_id"]
    eos = eos[0] if isinstance(eos, list) else eos
    params = {
        n: jnp.asarray(v.astype(np.float32))
        for n, v in safetensors_numpy.load_file(base / "model.safetensors").items()
    }
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    trained = tune(config, params, tokenizer, raw.get("bos_token_id"), eos)
    write(base, pathlib.Path(_OUT.value), trained)


if __name__ == "__main__":
    app.run(main)
