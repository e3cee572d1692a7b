"""Progress on stderr: bars on a terminal, one line a stage otherwise."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
            print(text, file=sys.stderr)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` bytes; yields the function that moves it on by some bytes."""
        if self.quiet or not self.bars:
            yield lambda nbytes: None
            return
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        console = Console(stderr=True, force_terminal=True)
        with progress.Progress(*columns, console=console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda nbytes: bars.update(task, advance=nbytes)

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of `total` steps, with the time left; yields the function that moves it on."""
        if self.quiet or not self.bars:
            self.note(f"{title}: {total} steps")
            yield lambda count: None
            return
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True, force_terminal=True)) as bars:
            task = bars.add_task(title, total=total)
            yield lambda count: bars.update(task, advance=count)
