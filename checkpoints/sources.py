"""What the commands do that read models of others: `hf`, `gguf`, `orbax`, `peft`, `plan` and `verify`."""

import argparse
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkpoints import hub
from checkpoints.errors import BAD_INPUT, CheckpointError
from checkpoints.outcome import Outcome, added, lines, progress_of, together
from checkpoints.progress import Progress

_PART = re.compile(r"-\d{5}-of-\d{5}$")


def hf(args: argparse.Namespace) -> Outcome:
    """Adds checkpoints in Hugging Face form."""
    return _models(args, "hf")


def gguf(args: argparse.Namespace) -> Outcome:
    """Adds GGUF files."""
    return _models(args, "gguf")


def orbax(args: argparse.Namespace) -> Outcome:
    """Adds orbax checkpoints."""
    return _models(args, "orbax")


def peft(args: argparse.Namespace) -> Outcome:
    """Adds adapters."""
    from checkpoints import peft
    from checkpoints.checkpoint import read_license

    zoo, activate = args.zoo, not args.no_activate

    def convert(path: Path, name: str, progress: Progress, origin: dict[str, Any]) -> Outcome:
        license = read_license(path)
        origin = {**origin, **({"license": license} if license else {})}
        return added(zoo, *peft.convert(path, zoo, args.base, name, progress, origin, activate))

    return _each(args, convert, check=lambda path: None, base=args.base)


def plan(args: argparse.Namespace) -> Outcome:
    """Tells what adding a checkpoint or adapter would do."""
    name = args.name or default_name(args.src)
    return _plan(args, args.src, name, args.base, args.details)


def verify(args: argparse.Namespace) -> Outcome:
    """Compares a model with its source."""
    from checkpoints.verify import verify

    progress = progress_of(args)
    against = hub.locate(args.against, progress).path
    found = verify(args.zoo, args.name, against, progress)
    last = f"{args.name} {'differs from' if found else 'is'} {args.against}"
    data = {"name": args.name, "against": args.against, "differences": found}
    return Outcome(data, lines(*found, last), 1 if found else 0)


def default_name(source: str) -> str:
    """What a model is called that is given no name: as its folder, file or repository.

    Raises:
      CheckpointError: that cannot be a name.
    """
    from jblock.zoo.records import ZooError, check_name

    text = source.partition("@")[0] if hub.is_hub_name(source) else str(Path(source).resolve())
    last = text.rstrip("/").rpartition("/")[2]
    if last.lower().endswith(".gguf"):
        last = _PART.sub("", last[: -len(".gguf")])
    name = re.sub(r"[^A-Za-z0-9_.-]+|\.{2,}", "-", last).strip("-.")
    try:
        return check_name(name)
    except ZooError as e:
        raise CheckpointError(f"{source} gives no name a model can have: give --name") from e


Convert = Callable[[Path, str, Progress, dict[str, Any]], Outcome]


def _models(args: argparse.Namespace, kind: str) -> Outcome:
    """Adds whole models, which must all be of one kind."""
    from checkpoints import hf

    zoo, activate = args.zoo, not args.no_activate

    def check(path: Path) -> None:
        from checkpoints.opening import kind_of

        found = kind_of(path)
        if found != kind:
            raise CheckpointError(
                f"{path} is {_KINDS[found]}: use 'jblock convert {found}', if it is the right one"
            )

    def convert(path: Path, name: str, progress: Progress, origin: dict[str, Any]) -> Outcome:
        return added(zoo, *hf.convert(path, zoo, name, progress, origin, activate))

    return _each(args, convert, check, base=None)


_KINDS = {
    "hf": "neither a GGUF file nor an orbax checkpoint",
    "gguf": "a GGUF file",
    "orbax": "an orbax checkpoint",
}


def _each(
    args: argparse.Namespace, convert: Convert, check: Callable[[Path], None], base: str | None
) -> Outcome:
    """Converts every source of a command, in their order. None is begun before all could be opened."""
    names = _names(args)
    if args.dry_run:
        return together(
            [
                _plan(args, source, name, base, details=False)
                for source, name in zip(args.src, names, strict=True)
            ]
        )
    progress = progress_of(args)
    found = [hub.locate(source, progress) for source in args.src]
    for source in found:
        check(source.path)
    if len(found) > 1 and base is None:
        from checkpoints.opening import open_checkpoint

        for source in found:
            open_checkpoint(source.path)
    done: list[Outcome] = []
    for source, name in zip(found, names, strict=True):
        origin = {"source": source.source, "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        origin |= {"revision": source.revision} if source.revision else {}
        try:
            done.append(convert(source.path, name, progress, origin))
        except BAD_INPUT as e:
            if not done:
                raise
            there = ", ".join(o.data["name"] for o in done)
            raise CheckpointError(f"{name}: {e} (before it, {there} were added)") from e
    return together(done)


def _names(args: argparse.Namespace) -> list[str]:
    given = args.name or []
    if given and len(given) != len(args.src):
        raise CheckpointError(
            f"{len(args.src)} sources and {len(given)} times --name: give one for each, in their order, or "
            "none"
        )
    names = given or [default_name(source) for source in args.src]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise CheckpointError(f"two sources would be {twice[0]!r}: give each a --name")
    return names


def _plan(
    args: argparse.Namespace, source: str, name: str, base: str | None, details: bool
) -> Outcome:
    from checkpoints import printing
    from checkpoints.plan import plan

    todo = hub.to_download(source)
    if todo.nbytes and getattr(args, "dry_run", False):
        size = printing.size(todo.nbytes)
        data = {"name": name, "source": source, "download_bytes": todo.nbytes, "files": todo.files}
        return Outcome(
            data,
            lines(
                f"{name}: {size} in {todo.files} files would be downloaded from {source}; what of it the zoo "
                "has already is known then"
            ),
        )
    progress = progress_of(args)
    data = plan(hub.locate(source, progress).path, args.zoo, name, base, progress)
    return Outcome(data, lambda: printing.print_plan(data, details))
