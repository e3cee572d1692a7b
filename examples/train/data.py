"""Texts, the tokenizer trained on them, and batches of token ids."""

import pathlib
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from examples.train import tasks

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOS, PAD)  # ids 0, 1, 2
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 1024
CHUNK_CHARS = 1500  # longest text document
HELD_OUT_TEXT = 0.03  # share of the text documents kept for measuring the bases


def library_texts(seed: int, max_bytes: int) -> list[str]:
    """Documents cut at line ends from the help topics and some standard library sources.

    Args:
      seed: decides the choice and the order of files.
      max_bytes: stop after about this many bytes.

    Returns:
      Documents of at most about `CHUNK_CHARS` characters, in shuffled order.
    """
    rng = random.Random(seed)
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    skip = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "turtledemo",
    }
    paths = [
        p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts[:-1])
    ]
    rng.shuffle(paths)
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    size = sum(len(text) for text in texts)
    for path in paths:
        if size >= max_bytes:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        texts.append(text)
    documents = [document for text in texts for document in _chunks(text)]
    rng.shuffle(documents)
    return documents


def _chunks(text: str) -> Iterator[str]:
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > CHUNK_CHARS and lines:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)


def generated_texts(seed: int, count: int) -> list[str]:
    """`count` documents of generated facts (`tasks.pretraining_document`)."""
    rng = random.Random(seed)
    return [tasks.pretraining_document(rng) for _ in range(count)]


def train_tokenizer(texts: Sequence[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE with digits split one by one; any UTF-8 text survives encode and decode.

    The encoder prepends `<|bos|>`. Generated facts among `texts` make " a" to " Z" frequent enough
    to become single tokens, which keeps the letter tasks regular.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Token ids of `text` without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def pack(tokenizer: tokenizers.Tokenizer, documents: Sequence[str], row_tokens: int) -> np.ndarray:
    """Documents as `<|bos|> text <|eos|>` end to end, cut into `(rows, row_tokens)` int32."""
    stream: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        stream += [BOS_ID, *encoding.ids, EOS_ID]
    rows = len(stream) // row_tokens
    return np.array(stream[: rows * row_tokens], np.int32).reshape(rows, row_tokens)


def task_batch(
    tokenizer: tokenizers.Tokenizer, items: Sequence[tasks.Item], max_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows for teacher forcing.

    Args:
      tokenizer: the family's tokenizer.
      items: B questions.
      max_tokens: row length T.

    Returns:
      `tokens` `(B, T)` int32: bos, prompt, answer, eos, padding; and `target` `(B, T)` bool: True
      where the token belongs to the answer or is the eos after it.

    Raises:
      ValueError: an item is longer than `max_tokens`.
    """
    tokens = np.full((len(items), max_tokens), PAD_ID, np.int32)
    target = np.zeros((len(items), max_tokens), bool)
    prompts = tokenizer.encode_batch([item.prompt for item in items])
    answers = tokenizer.encode_batch([item.answer for item in items], add_special_tokens=False)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = [*prompt.ids, *answer.ids, EOS_ID]
        if len(ids) > max_tokens:
            raise ValueError(
                f"{items[row].prompt!r} takes {len(ids)} tokens, Task.max_tokens is {max_tokens}"
            )
        tokens[row, : len(ids)] = ids
        target[row, len(prompt.ids) : len(ids)] = True
    return tokens, target
