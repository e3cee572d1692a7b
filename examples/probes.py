"""Text and task items of the demo family as files, for the converter's commands that measure and train.

  python -m examples.probes --folder DIR

Writes held-out.txt, train.txt (three tenths of its tokens are library text, the rest facts) and
train-mostly-text.txt (six tenths); for every task items/<task>.jsonl (held out) and train/<task>.jsonl;
facts.jsonl: held-out items of all tasks in the spelling that the bases read while they were trained; and
facts-further.jsonl: more of them.
"""

import json
import pathlib
import random

from absl import app, flags

from examples.train import data, tasks

_FOLDER = flags.DEFINE_string("folder", "probes", "Folder to write; made when absent.")
_SEED = 77
# Task -> what ends the question in its pretraining spelling.
_QUESTIONS = {
    "sort": ") is",
    "find": "] is",
    "add": " is",
    "copy": " |",
    "reverse": " <>",
    "next": " come",
    "largest": ") is",
}


def fact(item: tasks.Item, task: str) -> dict[str, object] | None:
    """An item as the bases read it: its line up to the answer, and the answer with the line's end."""
    question, mark, answer = item.line.rpartition(_QUESTIONS[task])
    if not mark:
        return None
    return {"prompt": question + mark, "answer": answer + "\n", "stop": False}


def write(folder: pathlib.Path, items: int = 4000, train_items: int = 8000) -> None:
    """Writes all files; equal calls write equal files.

    Args:
      folder: made when absent.
      items: held-out items of a task, at most; some tasks have fewer.
      train_items: items of a task to train on.
    """
    for name in ("items", "train"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    documents = data.library_texts(0, 6_000_000)
    held = documents[: int(data.HELD_OUT_TEXT * len(documents))]
    rng = random.Random(_SEED)
    # As the bases were trained: library text, and facts of items that are not held out.
    texts = documents[len(held) : len(held) + 900] + data.generated_texts(_SEED, 16_000)
    rng.shuffle(texts)
    (folder / "held-out.txt").write_text("\n".join(held), encoding="utf-8")
    (folder / "train.txt").write_text("\n".join(texts), encoding="utf-8")
    texts = documents[len(held) : len(held) + 2400] + data.generated_texts(_SEED + 1, 11_000)
    random.Random(_SEED).shuffle(texts)
    (folder / "train-mostly-text.txt").write_text("\n".join(texts), encoding="utf-8")
    for name, task in tasks.TASKS.items():
        draws = random.Random(f"{name}/{_SEED}")
        train = [tasks.draw_from(task, draws, "train") for _ in range(train_items)]
        _write(folder / "train" / f"{name}.jsonl", [_plain(i) for i in train])
        test: dict[str, tasks.Item] = {}
        for _ in range(20 * items):
            item = tasks.draw_from(task, draws, "test")
            test.setdefault(item.prompt, item)
            if len(test) == items:
                break
        _write(folder / "items" / f"{name}.jsonl", [_plain(i) for i in test.values()])
    facts: list[dict[str, object]] = []
    while len(facts) < items:
        facts += _fact(rng)
    _write(folder / "facts.jsonl", facts)
    seen, further = {f["prompt"] for f in facts}, dict[object, dict[str, object]]()
    draws = random.Random(991)
    while len(further) < items:
        further |= {
            f["prompt"]: f for f in _fact(draws) if f["prompt"] not in seen | further.keys()
        }
    _write(folder / "facts-further.jsonl", list(further.values()))


def _fact(rng: random.Random) -> list[dict[str, object]]:
    """One held-out fact, or none where an item has no such spelling."""
    name = rng.choice(list(_QUESTIONS))
    found = fact(tasks.draw_from(tasks.TASKS[name], rng, "test"), name)
    return [found] if found else []


def _plain(item: tasks.Item) -> dict[str, object]:
    return {"prompt": item.prompt, "answer": item.answer}


def _write(path: pathlib.Path, items: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(i) + "\n" for i in items), encoding="utf-8")


def main(argv: list[str]) -> None:
    """Writes the files."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    write(pathlib.Path(_FOLDER.value))


if __name__ == "__main__":
    app.run(main)
