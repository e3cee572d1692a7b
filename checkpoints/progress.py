"""Progress on stderr: bars on a terminal, a line now and then otherwise."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jblock.zoo.records import printable

# Seconds between two lines about the same work, where no bars are drawn.
LINE_SECONDS = 10.0


def size(nbytes: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


class Progress:
    """Where a command tells how far it is.

    Attributes:
      bars: draw bars.
      quiet: say nothing.
    """

    def __init__(self, bars: bool | None = None, quiet: bool = False):
        self.bars = sys.stderr.isatty() if bars is None else bars
        self.quiet = quiet

    def note(self, text: str) -> None:
        """One line for the user."""
        if not self.quiet:
            print(printable(text), file=sys.stderr)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` bytes; yields the function that moves it on by some bytes."""
        if self.quiet or not self.bars:
            yield _lines(self, title, total, size)
            return
        from rich import progress

        with _drawn(progress.DownloadColumn(), progress.TransferSpeedColumn()) as bars:
            task = bars.add_task(title, total=total)
            yield lambda nbytes: bars.update(task, advance=nbytes)

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` steps, with the time left; yields the function that moves it on."""
        if self.quiet or not self.bars:
            self.note(f"{title}: {total} steps")
            yield _lines(self, title, total, lambda count: f"{count:.0f}")
            return
        from rich import progress

        with _drawn(progress.MofNCompleteColumn()) as bars:
            task = bars.add_task(title, total=total)
            yield lambda count: bars.update(task, advance=count)


def _drawn(*columns: Any) -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        *columns,
        progress.TimeRemainingColumn(),
        console=Console(stderr=True, force_terminal=True),
    )


def _lines(
    progress: Progress, title: str, total: int, unit: Callable[[float], str]
) -> Callable[[int], None]:
    """Says how far the work is when LINE_SECONDS have passed since it last did."""
    began = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last < LINE_SECONDS or not done or done >= total:
            return
        last = now
        left = (now - began) * (total - done) / done
        progress.note(
            f"{title}: {unit(done)} of {unit(total)} ({100 * done // total}%), about {left:.0f} s left"
        )

    return advance
