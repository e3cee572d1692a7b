"""One conversion in a process of its own, for `bench convert`: tells its memory, or kills itself half way.

`python -m bench.convert_child SRC ZOO PART KILL`: PART is the bytes after which components are moved into
the zoo (0: as usual), KILL those of the checkpoint after which the process gets SIGKILL (0: never).
"""

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from checkpoints import hf
from checkpoints.progress import Progress
from jblock.zoo import writer


class _Watch(Progress):
    """Keeps the converter's notes, and ends the process where it is told to."""

    def __init__(self, kill_at: int):
        super().__init__(bars=False)
        self.notes: list[str] = []
        self._kill_at, self._done = kill_at, 0

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.notes.append(text)

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """See `Progress.bar`."""

        def advance(nbytes: int) -> None:
            self._done += nbytes
            if self._kill_at and self._done >= self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        yield advance


def peak_bytes() -> int:
    """Most resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's too, up to the exec
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(source: str, zoo: str, part: str, kill: str) -> None:
    """Converts, and prints one JSON line."""
    if int(part):
        writer.PART_BYTES = int(part)
    watch = _Watch(int(kill))
    chain, _ = hf.convert(Path(source), Path(zoo), "large", watch)
    print(json.dumps({"peak_bytes": peak_bytes(), "notes": watch.notes, "steps": len(chain.steps)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
