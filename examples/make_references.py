"""Writes reference.json: what transformers and peft generate from the committed weights.

  python -m examples.make_references  # needs torch, transformers and peft; minutes on two cores

Greedy decoding in float32. The tests of the engine read the file; the engine itself never imports
torch. An item holds

  model       name in family.json
  kind        "task" (a held-out item of the model's task), "shared" (the same prompt for every
              model), or "text" (a long prompt)
  prompt, prompt_ids
              the text and its token ids, bos included
  max_new_tokens
  output_ids  generated ids, with the eos where the model stopped
  output      their text, without special tokens
  finish      "stop" (eos) or "length"
  gaps        for every output position the best logit minus the second best, to 4 significant
              digits
  expected    the right answer, where `kind` is "task"; a model may miss it
"""

import json
import pathlib
import random

import peft
import torch
import transformers
from absl import app, logging

from examples.train import data, export, family, tasks

_ROOT = pathlib.Path(__file__).parent
_SEED = 7
_TASK_PROMPTS, _TEXT_PROMPTS = 28, 8
_SHARED_PROMPTS = (
    "sort 31524 =",
    "The quick brown fox",
    "def main(argv: list[str]) -> None:\n    ",
    "upper a b c =",
    "Gr\u00fc\u00dfe, \u65e5\u672c\u8a9e \u2713",
    "{ a: 12, b: 34, c: 56 }[ b ] is",
)


def _prompts(name: str, rng: random.Random, texts: list[str]) -> list[dict[str, object]]:
    """What one model is asked; a base gets all tasks, half of them in the spelling it has read."""
    found: list[dict[str, object]] = []
    if name in family.BASES:
        for number in range(_TASK_PROMPTS):
            task = rng.choice(list(tasks.TASKS.values()))
            item = tasks.draw_from(task, rng, "test")
            prompt = item.prompt if number % 2 else item.line[: len(item.line) * 2 // 3]
            found.append({"kind": "task", "prompt": prompt})
    else:
        items = tasks.distinct_items(
            tasks.TASKS[family.FINE_TUNES[name].task], _SEED, "test", _TASK_PROMPTS
        )
        found += [
            {"kind": "task", "prompt": item.prompt, "expected": item.answer} for item in items
        ]
    found += [{"kind": "shared", "prompt": prompt} for prompt in _SHARED_PROMPTS]
    found += [{"kind": "text", "prompt": texts.pop()} for _ in range(_TEXT_PROMPTS)]
    return [item | {"max_new_tokens": rng.choice((8, 12, 16, 24, 32, 48))} for item in found]


def _long_prompts(
    rng: random.Random, tokenizer: transformers.PreTrainedTokenizerFast, count: int
) -> list[str]:
    """Beginnings of library texts, and runs of generated facts, of 100 to 300 tokens."""
    documents = data.library_texts(_SEED, 1_000_000)
    found = []
    while len(found) < count:
        if rng.random() < 0.7:
            text = documents.pop()
        else:
            text = "".join(tasks.pretraining_document(rng) for _ in range(6))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        length = rng.randint(100, 300)
        prompt = tokenizer.decode(ids[: length - 1])
        if len(ids) >= length and "\ufffd" not in prompt:
            found.append(prompt)
    return found


def _load(name: str) -> torch.nn.Module:
    """A member as transformers or peft loads it, in float32."""
    tune = family.FINE_TUNES.get(name)
    folder = tune.base if tune and tune.rank else name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        _ROOT / "models" / folder, dtype=torch.float32
    )
    if tune and tune.rank:
        model = peft.PeftModel.from_pretrained(model, _ROOT / "adapters" / name).float()
    return model.eval()


@torch.no_grad()
def _answer(
    model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, item: dict[str, object]
) -> dict[str, object]:
    """Generates greedily and notes how close each choice was."""
    ids = tokenizer(item["prompt"])["input_ids"]
    result = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
        max_new_tokens=item["max_new_tokens"], return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    output = result.sequences[0, len(ids) :].tolist()
    best = torch.stack([logits[0].topk(2).values for logits in result.logits])  # (outputs, 2)
    gaps = [float(f"{gap:.4g}") for gap in (best[:, 0] - best[:, 1]).tolist()]
    return item | {
        "prompt_ids": ids,
        "output_ids": output,
        "output": tokenizer.decode(output, skip_special_tokens=True),
        "finish": "stop" if output[-1] == data.EOS_ID else "length",
        "gaps": gaps,
    }


def main(argv: list[str]) -> None:
    """Writes reference.json beside this file."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    names = [*family.BASES, *family.FINE_TUNES]
    rng = random.Random(_SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(_ROOT / "models" / names[0])
    reader = export.read_tokenizer(_ROOT / "models" / names[0])
    texts = _long_prompts(rng, tokenizer, _TEXT_PROMPTS * len(names))
    items = []
    for name in names:
        model = _load(name)
        for item in _prompts(name, rng, texts):
            items.append({"model": name} | _answer(model, tokenizer, item))
            if items[-1]["prompt_ids"] != reader.encode(item["prompt"]).ids:
                raise ValueError(
                    f"transformers and tokenizers disagree on the ids of {item['prompt']!r}"
                )
        logging.info("%s: %d items so far", name, len(items))
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    lines = [json.dumps(item, separators=(",", ":"), ensure_ascii=False) for item in items]
    head = json.dumps({"versions": versions, "dtype": "float32", "decoding": "greedy"})[:-1]
    text = head + ', "items": [\n' + ",\n".join(lines) + "\n]}\n"
    (_ROOT / "reference.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
