"""Measures the demo family on held-out items, from the committed weights, and writes family.json.

  python -m examples.evaluate            # every member: about ten minutes on two cores
  python -m examples.evaluate --items=200 --dry_run

Greedy decoding in float32 of the stored bfloat16 weights. An answer counts if the text before the
end-of-sequence token equals the expected one, character for character. The base is given the same
prompts; because it was never told to stop after an answer, `base_begins_accuracy` also counts a
base's output that merely begins with the expected answer.
"""

import functools
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from absl import app, flags

from examples.train import data, export, family, tasks
from examples.train import model as llama

_ROOT = pathlib.Path(__file__).parent
_ITEMS = flags.DEFINE_integer("items", 2000, "Held-out items a member is measured on.")
_ONLY = flags.DEFINE_list("only", [], "Names to measure; all when empty.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the entries without writing family.json.")

_ITEM_SEED = 20
_BATCH = 250  # prompts decoded together


@functools.partial(jax.jit, static_argnums=0)
def _next_tokens(
    config: llama.Config,
    params: llama.Params,
    tokens: jax.Array,
    last: jax.Array,
    lora_scale: float,
) -> jax.Array:
    """The most likely token after position `last[b]` of every row: `(B, T), (B,) -> (B,)`."""
    hidden = llama.forward(config, params, tokens, lora_scale)
    picked = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # (B, D)
    return jnp.argmax(picked @ llama.unembedding(config, params).T, axis=-1)


def generate(
    config: llama.Config,
    params: Mapping[str, jax.Array],
    tokenizer: tokenizers.Tokenizer,
    prompts: list[str],
    max_tokens: int,
    lora_scale: float = 0.0,
) -> list[str]:
    """Greedy completions, with "<|eos|>" at the end of those that stopped.

    Args:
      config: dimensions of the model.
      params: float32 parameters, with LoRA pairs where an adapter is on.
      tokenizer: the family's tokenizer.
      prompts: texts to complete.
      max_tokens: length of prompt and completion together, in tokens.
      lora_scale: alpha / rank of the adapter.
    """
    texts = []
    for start in range(0, len(prompts), _BATCH):
        encoded = [
            encoding.ids for encoding in tokenizer.encode_batch(prompts[start : start + _BATCH])
        ]
        lengths = np.array([len(ids) for ids in encoded])
        tokens = np.full((len(encoded), max_tokens), data.PAD_ID, np.int32)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = ids
        ends = lengths.copy()
        running = ends < max_tokens
        while running.any():
            width = min(-(-int(ends.max()) // 8) * 8, max_tokens)  # few shapes, few compilations
            last = np.minimum(ends, width) - 1
            best = np.asarray(_next_tokens(config, params, tokens[:, :width], last, lora_scale))
            rows = np.flatnonzero(running)
            tokens[rows, ends[rows]] = best[rows]
            ends[rows] += 1
            running &= (best != data.EOS_ID) & (ends < max_tokens)
        for row, ids in enumerate(tokens):
            texts.append(
                tokenizer.decode(ids[lengths[row] : ends[row]].tolist(), skip_special_tokens=False)
            )
    return texts


def bits_per_byte(
    config: llama.Config, params: Mapping[str, jax.Array], tokenizer: tokenizers.Tokenizer
) -> float:
    """Cross entropy on held-out library text, in bits per UTF-8 byte, over rows of 256 tokens."""
    documents = data.library_texts(0, 6_000_000)
    documents = documents[: int(data.HELD_OUT_TEXT * len(documents))]
    rows = data.pack(tokenizer, documents, 256)
    content = sum(len(tokenizer.decode(row.tolist()).encode()) for row in rows)

    @jax.jit
    def nats(tokens: jax.Array) -> jax.Array:
        logits = llama.forward(config, params, tokens)[:, :-1] @ llama.unembedding(config, params).T
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.sum(log_probs)

    total = sum(float(nats(rows[start : start + 8])) for start in range(0, len(rows) - 7, 8))
    share = (len(rows) // 8 * 8) / len(rows)
    return total / np.log(2) / (content * share)


def _describe_base(
    base: family.Base, params: llama.Params, tokenizer: tokenizers.Tokenizer
) -> dict[str, object]:
    return {
        "name": base.name,
        "kind": "base",
        "base": None,
        "path": f"models/{base.name}",
        "parameters": llama.count_params(params),
        "layers": base.config.num_layers,
        "text_bits_per_byte": round(bits_per_byte(base.config, params, tokenizer), 3),
    }


def _mean(hits: Iterable[bool]) -> float:
    return round(float(np.mean(list(hits))), 4)


def _describe_fine_tune(
    tune: family.FineTune, base_params: llama.Params, tokenizer: tokenizers.Tokenizer, count: int
) -> dict[str, object]:
    """Measures one fine-tune and its base on the same items."""
    config, task = family.BASES[tune.base].config, tasks.TASKS[tune.task]
    items = tasks.distinct_items(task, _ITEM_SEED, "test", count)
    prompts, answers = [item.prompt for item in items], [item.answer for item in items]
    path = ("adapters/" if tune.rank else "models/") + tune.name
    if tune.rank:
        params, scale = {**base_params, **export.read_adapter(_ROOT / path)}, tune.alpha / tune.rank
    else:
        params, scale = export.read_model(_ROOT / path), 0.0
    shared = sum(
        int(value.size)
        for name, value in base_params.items()
        if bool(jnp.array_equal(value, params[name]))
    )
    tuned_texts = generate(config, params, tokenizer, prompts, task.max_tokens, scale)
    base_texts = generate(config, base_params, tokenizer, prompts, task.max_tokens)

    exact = [answer + data.EOS for answer in answers]
    return {
        "name": tune.name,
        "kind": tune.kind,
        "base": tune.base,
        "path": path,
        "frozen_layers": list(range(tune.frozen_layers)) if tune.kind == "frozen" else [],
        "rank": tune.rank or None,
        "alpha": tune.alpha or None,
        "modules": list(tune.modules),
        "shared_parameters": shared,
        "task": tune.task,
        "example": {"prompt": prompts[0], "answer": answers[0]},
        "accuracy": _mean(map(operator.eq, tuned_texts, exact)),
        "base_accuracy": _mean(map(operator.eq, base_texts, exact)),
        "base_begins_accuracy": _mean(map(str.startswith, base_texts, answers)),
        "items": len(items),
    }


def main(argv: list[str]) -> None:
    """Measures what `--only` names, or everything, and updates family.json."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    log = json.loads((_ROOT / "training.json").read_text())
    path = _ROOT / "family.json"
    known = json.loads(path.read_text())["models"] if path.exists() else []
    entries = {entry["name"]: entry for entry in known}
    names = _ONLY.value or [*family.BASES, *family.FINE_TUNES]
    for name in names:
        base_name = name if name in family.BASES else family.FINE_TUNES[name].base
        tokenizer = export.read_tokenizer(_ROOT / "models" / base_name)
        base_params = export.read_model(_ROOT / "models" / base_name)
        if name in family.BASES:
            entry = _describe_base(family.BASES[name], base_params, tokenizer)
        else:
            tune = family.FINE_TUNES[name]
            entry = _describe_fine_tune(tune, base_params, tokenizer, _ITEMS.value)
        entries[name] = entry | {"training": log[name]}
        print(json.dumps(entries[name]), flush=True)
    if not _DRY_RUN.value:
        order = [name for name in [*family.BASES, *family.FINE_TUNES] if name in entries]
        text = json.dumps({"models": [entries[name] for name in order]}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
