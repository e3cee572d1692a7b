"""Many command lines of one program: Python starts and reads modules once, and each gets a copy of that."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_PROGRAM = """
import importlib, json, os, sys
folder, module, *more = sys.argv[1:]
for name in more:
    importlib.import_module(name)
program = importlib.import_module(module)
for at, words in enumerate(json.load(sys.stdin)):
    if not os.fork():
        with open(f"{folder}/{at}", "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [module, *words]
        program.run()
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_each(
    module: str, lines: Sequence[Sequence[str]], folder: Path, *more: str
) -> list[tuple[int, str]]:
    """The exit code of each command line, and what it printed.

    Args:
      module: has the program's `run`.
      lines: words of each, without the program's name.
      folder: for what they print.
      *more: modules that they will need.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder), module, *more],
        input=json.dumps([list(words) for words in lines]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
    )
    codes = map(int, done.stdout.split())
    return [(code, (folder / str(at)).read_text()) for at, code in enumerate(codes)]
