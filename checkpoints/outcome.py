"""The end of a command: data for programs, lines for people."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from checkpoints.progress import Progress
from jblock.zoo.records import printable


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a command.

    Attributes:
      data: plain JSON, what `--json` prints.
      show: prints the same for people.
      code: exit code; 1 where a check found something.
    """

    data: dict[str, Any]
    show: Callable[[], None]
    code: int = 0


def lines(*texts: str) -> Callable[[], None]:
    """What prints these lines."""

    def show() -> None:
        for text in texts:
            print(printable(text))

    return show


def progress_of(args: argparse.Namespace) -> Progress:
    """Where a command tells how far it is."""
    return Progress(bars=args.progress, quiet=args.quiet)


def added(zoo: str, chain: Any, new: bool) -> Outcome:
    """The outcome of what adds a chain to a zoo, unless it was there."""
    from jblock.zoo.store import Zoo

    active = Zoo.open(zoo).model(chain.name).active == chain.version
    base = {"base": chain.base, "base_digest": chain.base_digest} if chain.base else {}
    at = f"{chain.name}@{chain.version}"
    data = {
        "name": chain.name,
        "version": chain.version,
        "digest": chain.digest,
        **base,
        "added": new,
        "active": active,
    }
    on = f" on {chain.base}" if chain.base else ""
    what = "added" if new else "unchanged"
    more = "" if active else f", not active: 'jblock convert activate {at}' makes it so"
    return Outcome(data, lines(f"{at}{on} {what}{more}"))


def together(outcomes: list[Outcome]) -> Outcome:
    """One outcome for what was done to several models: that of a single one as it is."""
    if len(outcomes) == 1:
        return outcomes[0]

    def show() -> None:
        for outcome in outcomes:
            outcome.show()

    return Outcome({"models": [o.data for o in outcomes]}, show, max(o.code for o in outcomes))
