"""The family in a zoo: what belongs to it, converting it, and what it takes."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from examples.demo_reference import DemoError, Item

ROOT = pathlib.Path(__file__).parent


def load_family(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Entries of family.json for these names (all when empty).

    Raises:
      DemoError: a name is not there.
    """
    entries = {e["name"]: e for e in json.loads((ROOT / "family.json").read_text())["models"]}
    unknown = [name for name in names if name not in entries]
    if unknown:
        raise DemoError(f"--models: {unknown[0]!r} is none of the family: {', '.join(entries)}")
    return {name: entries[name] for name in entries if not names or name in names}


def with_bases(family: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What to convert, in order: the bases that adapters ride on come before them."""
    needed = {e["base"] for e in family.values() if e["kind"] == "lora"}
    every = load_family(())
    return [e for name, e in every.items() if name in family or name in needed]


def convert(
    entries: Sequence[dict[str, Any]],
    zoo: pathlib.Path,
    on_done: Callable[[], object] = lambda: None,
) -> None:
    """Puts models and adapters into the zoo; those it has already stay as they are.

    This is what `jblock convert hf` and `jblock convert peft` do, without a process for each.

    Args:
      entries: of family.json, bases first.
      zoo: folder of the zoo; made when absent.
      on_done: called after each.

    Raises:
      DemoError: the converter refused one.
    """
    import jax

    # Converting computes nothing; an accelerator is the server's.
    jax.config.update("jax_platforms", "cpu")
    from checkpoints import hf, peft
    from checkpoints.errors import BAD_INPUT
    from checkpoints.progress import Progress

    quiet = Progress(bars=False, quiet=True)
    for entry in entries:
        name, source = entry["name"], ROOT / entry["path"]
        try:
            if entry["kind"] == "lora":
                peft.convert(source, zoo, entry["base"], name, quiet)
            else:
                hf.convert(source, zoo, name, quiet)
        except BAD_INPUT as error:
            raise DemoError(f"{source} cannot be converted into {zoo}: {error}") from error
        on_done()


def zoo_totals(zoo: pathlib.Path, names: Sequence[str]) -> dict[str, int]:
    """Bytes of the live versions of these models: as separate checkpoints, and as stored."""
    from jblock.zoo.inventory import inventory
    from jblock.zoo.store import Zoo

    data = inventory(Zoo.open(zoo))
    rows = [r for r in data["chains"] if r["active"] and r["name"] in names]
    used = {
        i for row in rows for step in row["steps"] for i in (step["component"], *step["deltas"])
    }
    parts = (*data["components"], *data["deltas"])
    return {
        "logical_bytes": sum(row["logical_bytes"] for row in rows),
        "stored_bytes": sum(part["nbytes"] for part in parts if part["id"] in used),
    }


def check_prompts(zoo: pathlib.Path, items: Sequence[Item]) -> None:
    """Makes sure that a prompt sent as text is the prompt that transformers was given.

    Raises:
      DemoError: the zoo's tokenizer makes other ids of one.
    """
    from tokenizers import Tokenizer

    from jblock.zoo.store import Zoo

    store = Zoo.open(zoo)
    tokenizers: dict[str, Tokenizer] = {}
    for item in items:
        id_ = store.chain(item.model).tokenizer
        if id_ is None:
            raise DemoError(f"{item.model} has no tokenizer in {zoo}; convert it again")
        if id_ not in tokenizers:
            tokenizers[id_] = Tokenizer.from_file(str(store.tokenizer_path(id_) / "tokenizer.json"))
        if tuple(tokenizers[id_].encode(item.prompt).ids) != item.prompt_ids:
            raise DemoError(f"{item.model}: {item.prompt!r} has other ids than in the reference")
