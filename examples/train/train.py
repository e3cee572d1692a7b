"""Trains the demo family: tokenizer, bases, fine-tunes, adapters.

  python -m examples.train.train                      # everything, in order
  python -m examples.train.train --only=demo-3m-sort  # one member; its base must be there

Seeded. On another Python version the library text differs, so the weights will too.
"""

import functools
import json
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterator, Mapping

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from absl import app, flags, logging

from examples.train import data, export, family, tasks
from examples.train import model as llama

_OUTPUT = flags.DEFINE_string(
    "output", str(pathlib.Path(__file__).parents[1]), "Directory of models/ and adapters/."
)
_ONLY = flags.DEFINE_list("only", [], "Names to train; all when empty.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of texts, items and initial weights.")

_TEXT_BYTES = 6_000_000
_GENERATED_DOCUMENTS = 45_000
_VALIDATION_ITEMS = 512
_CHECK_EVERY = 100  # steps between looks at the validation items

Batch = tuple[
    np.ndarray, np.ndarray
]  # tokens (B, T) int32; target (B, T) bool, True where a token is to be predicted
Loss = Callable[[llama.Params, llama.Params, jax.Array, jax.Array], jax.Array]


def _make_loss(config: llama.Config, lora_scale: float) -> Loss:
    """Mean cross entropy, in nats per target token; gradients go to the first argument only."""

    def loss(
        trained: llama.Params, fixed: llama.Params, tokens: jax.Array, target: jax.Array
    ) -> jax.Array:
        params = {**fixed, **trained}
        hidden = llama.forward(config, params, tokens, lora_scale)[:, :-1]
        logits = hidden @ llama.unembedding(config, params).T
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * target[:, 1:]) / jnp.sum(target[:, 1:])

    return loss


@functools.partial(jax.jit, static_argnums=0)
def _count_exact(
    config: llama.Config,
    params: llama.Params,
    tokens: jax.Array,
    target: jax.Array,
    lora_scale: float,
) -> jax.Array:
    """Rows whose every target token is the most likely one, as greedy decoding would need."""
    hidden = llama.forward(config, params, tokens, lora_scale)[:, :-1]
    best = jnp.argmax(hidden @ llama.unembedding(config, params).T, axis=-1)
    return jnp.sum(jnp.all((best == tokens[:, 1:]) | ~target[:, 1:], axis=1))


def _fit(
    loss: Loss,
    trained: llama.Params,
    fixed: llama.Params,
    batches: Iterator[Batch],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    check: Callable[[llama.Params, int], bool],
) -> tuple[llama.Params, int]:
    """AdamW with a cosine schedule; ends after `steps`, or when `check(trained, step)` says so.

    Returns:
      The trained parameters and the number of steps taken.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, steps // 10), steps, 0.05 * learning_rate
    )
    decays = jax.tree.map(lambda value: value.ndim > 1, trained)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=weight_decay, mask=decays),
    )
    state = optimizer.init(trained)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(trained, state, fixed, tokens, target):
        value, gradients = jax.value_and_grad(loss)(trained, fixed, tokens, target)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained = jax.tree.map(jnp.array, trained)  # the caller's arrays must survive the donation
    for step in range(1, steps + 1):
        trained, state, value = step_fn(trained, state, fixed, *next(batches))
        if step % _CHECK_EVERY == 0:
            logging.info("step %d of %d: loss %.4f", step, steps, value)
            if check(trained, step):
                return trained, step
    return trained, steps


def _pretraining_batches(
    base: family.Base, tokenizer: tokenizers.Tokenizer, seed: int
) -> Iterator[Batch]:
    """Shuffled rows, `base.text_share` of library text, the rest of generated facts."""
    documents = data.library_texts(seed, _TEXT_BYTES)
    documents = documents[int(data.HELD_OUT_TEXT * len(documents)) :]
    text = data.pack(tokenizer, documents, base.row_tokens)
    facts = data.pack(
        tokenizer, data.generated_texts(seed + 1, _GENERATED_DOCUMENTS), base.row_tokens
    )
    logging.info("%d text tokens, %d generated tokens", text.size, facts.size)
    rng = np.random.default_rng(seed)
    rows = base.tokens // base.row_tokens
    text_rows = int(base.text_share * rows)
    order = np.concatenate(
        [
            np.resize(rng.permutation(len(text)), text_rows),
            len(text) + np.resize(rng.permutation(len(facts)), rows - text_rows),
        ]
    )
    rng.shuffle(order)
    both = np.concatenate([text, facts])
    for start in range(0, rows - base.batch_rows + 1, base.batch_rows):
        tokens = both[order[start : start + base.batch_rows]]
        yield tokens, np.ones(tokens.shape, bool)


def _task_batches(
    tune: family.FineTune, tokenizer: tokenizers.Tokenizer, seed: int
) -> Iterator[Batch]:
    task = tasks.TASKS[tune.task]
    rng = random.Random(f"{tune.name}/{seed}")
    while True:
        items = [tasks.draw_from(task, rng, "train") for _ in range(tune.batch_rows)]
        yield data.task_batch(tokenizer, items, task.max_tokens)


def train_base(
    base: family.Base, tokenizer: tokenizers.Tokenizer, seed: int
) -> tuple[llama.Params, dict[str, float]]:
    """Pretrains a base; returns its bfloat16-rounded parameters and figures for the log."""
    params = llama.init_params(base.config, jax.random.key(seed))
    steps = base.tokens // base.row_tokens // base.batch_rows
    params, steps = _fit(
        _make_loss(base.config, 0.0), params, {}, _pretraining_batches(base, tokenizer, seed),
        steps=steps, learning_rate=base.learning_rate, weight_decay=0.1, check=lambda *_: False,
    )  # fmt: skip
    return export.round_to_bf16(params), {
        "steps": steps,
        "tokens": steps * base.batch_rows * base.row_tokens,
    }


def train_fine_tune(
    tune: family.FineTune, base_params: llama.Params, tokenizer: tokenizers.Tokenizer, seed: int
) -> tuple[llama.Params, dict[str, float]]:
    """Trains a fine-tune from its base's stored parameters.

    Returns:
      A full checkpoint whose frozen tensors are the base's own, or an adapter's LoRA parameters,
      rounded to bfloat16; and figures for the log.
    """
    config = family.BASES[tune.base].config
    task = tasks.TASKS[tune.task]
    scale = tune.alpha / tune.rank if tune.rank else 0.0
    if tune.kind == "lora":
        trained = llama.init_lora(config, jax.random.key(seed + 1), tune.rank, tune.modules)
    else:
        trained = {name: value for name, value in base_params.items() if tune.trains(name)}
    fixed = {name: value for name, value in base_params.items() if name not in trained}
    items = tasks.distinct_items(task, seed, "validation", _VALIDATION_ITEMS)
    validation = data.task_batch(tokenizer, items, task.max_tokens)
    figures: dict[str, float] = {}

    def check(trained: llama.Params, step: int) -> bool:
        params = {**fixed, **export.round_to_bf16(trained)}
        exact = int(_count_exact(config, params, *validation, scale)) / len(items)
        logging.info("%s step %d: %.4f of the validation items exact", tune.name, step, exact)
        figures["validation_accuracy"] = round(exact, 4)
        return exact >= tune.target

    trained, steps = _fit(
        _make_loss(config, scale), trained, fixed, _task_batches(tune, tokenizer, seed),
        steps=tune.max_steps, learning_rate=tune.learning_rate, weight_decay=0.01, check=check,
    )  # fmt: skip
    result = export.round_to_bf16(trained)
    if tune.kind != "lora":
        result = {**fixed, **result}
    return result, {"steps": steps, "tokens": steps * tune.batch_rows * task.max_tokens, **figures}


def _log_figures(output: pathlib.Path, name: str, figures: Mapping[str, float]) -> None:
    path = output / "training.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    log[name] = dict(figures)
    path.write_text(json.dumps(dict(sorted(log.items())), indent=2) + "\n")
    logging.info("%s: %s", name, figures)


def main(argv: list[str]) -> None:
    """Trains what `--only` names, or everything, and writes it under `--output`."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    output, seed = pathlib.Path(_OUTPUT.value), _SEED.value
    names = _ONLY.value or [*family.BASES, *family.FINE_TUNES]
    if unknown := set(names) - set(family.BASES) - set(family.FINE_TUNES):
        raise app.UsageError(
            f"--only: unknown {sorted(unknown)}; known are {[*family.BASES, *family.FINE_TUNES]}"
        )
    tokenizer_path = output / "tokenizer" / "tokenizer.json"
    if not tokenizer_path.exists():
        texts = data.library_texts(seed, _TEXT_BYTES // 3) + data.generated_texts(seed, 20_000)
        export.write_tokenizer(
            tokenizer_path.parent, data.train_tokenizer(texts), llama.Config.max_positions
        )
    tokenizer = export.read_tokenizer(tokenizer_path.parent)
    for name in names:
        start = time.monotonic()
        if name in family.BASES:
            base = family.BASES[name]
            params, figures = train_base(base, tokenizer, seed)
            export.write_model(output / "models" / name, base.config, params, tokenizer)
        else:
            tune = family.FINE_TUNES[name]
            base_params = export.read_model(output / "models" / tune.base)
            params, figures = train_fine_tune(tune, base_params, tokenizer, seed)
            if tune.kind == "lora":
                export.write_adapter(output / "adapters" / name, tune, params)
            else:
                config = family.BASES[tune.base].config
                export.write_model(output / "models" / name, config, params, tokenizer)
        _log_figures(output, name, figures | {"seconds": round(time.monotonic() - start)})


if __name__ == "__main__":
    app.run(main)
