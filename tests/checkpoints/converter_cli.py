"""Runs the converter's commands in this process, as the console script would."""

import dataclasses
from pathlib import Path

import pytest

from checkpoints import main


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command gave: its exit code and what it printed."""

    code: int
    out: str
    err: str


class Cli:
    """One zoo and the commands on it."""

    def __init__(self, zoo: Path, capsys: pytest.CaptureFixture):
        self.zoo = zoo
        self._capsys = capsys

    def __call__(self, *argv: object) -> Result:
        """Runs `jblock-convert *argv --zoo ...`."""
        self._capsys.readouterr()
        try:
            args = main.parse(["jblock-convert", *map(str, argv), "--zoo", str(self.zoo)])
            code = main.main(args)
        except SystemExit as e:
            code = int(str(e.code))
        captured = self._capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def ok(self, *argv: object) -> str:
        """Runs a command that must succeed; returns what it printed."""
        result = self(*argv)
        assert result.code == 0, result.err + result.out
        return result.out
