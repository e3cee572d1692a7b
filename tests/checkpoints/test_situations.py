"""The table of situations (docs/situations.md) and the tests that it names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(
    r"^\| (?P<what>[^|]+) \| (?P<verdict>\w+) \| [^|]*\| (?P<file>\S+)::(?P<test>\w+) \|$"
)


def test_every_verdict_is_held_by_a_test():
    lines = (ROOT / "docs" / "situations.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("| ") and "**" not in line][2:]
    rows = [ROW.match(line) for line in table]
    assert [t for t, row in zip(table, rows, strict=True) if row is None] == []
    assert len(rows) >= 70
    assert {row["verdict"] for row in rows} == {"served", "noted", "refused"}
    for file in {row["file"] for row in rows}:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {row["test"] for row in rows if row["file"] == file} <= there, file
