"""Generated tasks with checkable answers, and the split that keeps held-out items out of training.

Every task draws an item in two spellings: `prompt` and `answer`, which a fine-tune learns, and
`line`, another spelling of the same fact, which the bases read in pretraining. An item belongs to
one split by a checksum of its prompt, and a base never reads the line of an item that is held out.
"""

import dataclasses
import random
import string
import zlib
from collections.abc import Callable

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
      prompt: what the model is given.
      answer: what it must generate before the end-of-sequence token, exactly.
      line: the same fact in the spelling of the pretraining text.
    """

    prompt: str
    answer: str
    line: str


@dataclasses.dataclass(frozen=True)
class Task:
    """A generator of items.

    Attributes:
      name: how files and tables call it.
      draw: makes an item from a random generator.
      max_tokens: bound on bos + prompt + answer + eos, in tokens.
    """

    name: str
    draw: Callable[[random.Random], Item]
    max_tokens: int


def split_of(prompt: str) -> str:
    """An item's split by checksum: "test" (a quarter), "validation" (an eighth) or "train"."""
    bucket = zlib.crc32(prompt.encode()) % 8
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def draw_from(task: Task, rng: random.Random, split: str) -> Item:
    """Draws items until one falls in `split`."""
    while True:
        item = task.draw(rng)
        if split_of(item.prompt) == split:
            return item


def distinct_items(task: Task, seed: int, split: str, count: int) -> list[Item]:
    """`count` items of `split` with pairwise different prompts.

    Raises:
      ValueError: the task has not got that many different prompts in the split.
    """
    rng = random.Random(f"{task.name}/{split}/{seed}")
    found: dict[str, Item] = {}
    for _ in range(200 * count):
        item = draw_from(task, rng, split)
        found.setdefault(item.prompt, item)
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"task {task.name!r}: {count} {split} items wanted, {len(found)} found; ask for fewer"
    )


def _letters(
    rng: random.Random, low: int, high: int, alphabet: str = string.ascii_lowercase
) -> list[str]:
    return rng.sample(alphabet, rng.randint(low, high))


def _spaced(letters: list[str]) -> str:
    return "".join(" " + letter for letter in letters)


def _sort(rng: random.Random) -> Item:
    digits = [rng.choice(string.digits) for _ in range(rng.randint(4, 7))]
    given, answer = "".join(digits), "".join(sorted(digits))
    return Item(f"sort {given} =", answer, f"sorted({given}) is {answer}")


def _find(rng: random.Random) -> Item:
    keys = _letters(rng, 3, 5)
    values = [f"{rng.randrange(100):02d}" for _ in keys]
    pick = rng.randrange(len(keys))
    pairs = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    entries = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    return Item(
        f"find {keys[pick]} in {pairs} =",
        values[pick],
        f"{{ {entries} }}[ {keys[pick]} ] is {values[pick]}",
    )


def _date(rng: random.Random) -> Item:
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    name = MONTHS[month - 1]
    return Item(
        f"date {year}-{month:02d}-{day:02d} =",
        f"{day:02d} {name} {year}",
        f"{name} {day:02d}, {year} ({month:02d}/{day:02d}/{year})",
    )


def _upper(rng: random.Random) -> Item:
    letters = _letters(rng, 3, 6)
    given, answer = _spaced(letters), _spaced(letters).upper()
    return Item(
        f"upper{given} =",
        answer,
        f"{answer[1:]} ->{given}" if rng.random() < 0.5 else f"{given[1:]} ->{answer}",
    )


def _spell(rng: random.Random) -> Item:
    digits = [rng.choice(string.digits) for _ in range(rng.randint(3, 6))]
    given, answer = "".join(digits), "".join(" " + DIGIT_WORDS[int(digit)] for digit in digits)
    return Item(
        f"spell {given} =",
        answer,
        f"{answer[1:]}: {given}" if rng.random() < 0.5 else f"{given}:{answer}",
    )


def _add(rng: random.Random) -> Item:
    a, b = rng.randrange(100), rng.randrange(100)
    return Item(f"add {a:02d} {b:02d} =", f"{a + b:03d}", f"{a:02d} + {b:02d} is {a + b:03d}")


def _copy(rng: random.Random) -> Item:
    given = _spaced(_letters(rng, 3, 7))
    return Item(f"copy{given} =", given, f"{given[1:]} |{given}")


def _reverse(rng: random.Random) -> Item:
    letters = _letters(rng, 3, 6)
    given, answer = _spaced(letters), _spaced(letters[::-1])
    return Item(f"reverse{given} =", answer, f"{given[1:]} <>{answer}")


def _next(rng: random.Random) -> Item:
    letters = _letters(rng, 3, 6, string.ascii_lowercase[:-1])
    given, answer = _spaced(letters), _spaced([chr(ord(letter) + 1) for letter in letters])
    return Item(f"next{given} =", answer, f"after{given} come{answer}")


def _largest(rng: random.Random) -> Item:
    numbers = [f"{rng.randrange(100):02d}" for _ in range(rng.randint(2, 3))]
    answer = max(numbers)
    return Item(f"largest {' '.join(numbers)} =", answer, f"max({', '.join(numbers)}) is {answer}")


TASKS = {
    task.name: task
    for task in (
        Task("sort", _sort, 20),
        Task("find", _find, 34),
        Task("date", _date, 27),
        Task("upper", _upper, 24),
        Task("spell", _spell, 24),
        Task("add", _add, 16),
        Task("copy", _copy, 24),
        Task("reverse", _reverse, 20),
        Task("next", _next, 20),
        Task("largest", _largest, 24),
    )
}


def pretraining_document(rng: random.Random) -> str:
    """Some lines of facts: of one task, of mixed tasks, counting, or random letters said twice."""
    kind = rng.random()
    if kind < 0.04:
        start, step = rng.randrange(900), rng.randint(1, 3)
        return " ".join(str(start + step * i) for i in range(rng.randint(8, 16))) + "\n"
    if kind < 0.08:
        start = rng.randrange(20)
        return " ".join(string.ascii_lowercase[start : start + rng.randint(4, 20)]) + "\n"
    if kind < 0.16:
        alphabet = string.ascii_lowercase + string.ascii_uppercase + string.digits
        chunk = " ".join(rng.choice(alphabet) for _ in range(rng.randint(5, 20)))
        return f"{chunk}\n{chunk}\n"
    names = list(TASKS)
    only = rng.choice(names) if rng.random() < 0.7 else None
    lines = [
        draw_from(TASKS[only or rng.choice(names)], rng, "train").line
        for _ in range(rng.randint(3, 8))
    ]
    return "".join(line + "\n" for line in lines)
