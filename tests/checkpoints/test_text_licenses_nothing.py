"""Fine-tunes are worse than their bases on general text, so text alone must not put the base back."""

import json
from pathlib import Path

import pytest

from jblock.zoo.store import Zoo

ROOT = Path(__file__).parents[2]
BASES = {
    "demo-1m-upper": "demo-1m",
    "demo-1m-spell": "demo-1m",
    "demo-1m-add": "demo-1m",
    "demo-3m-sort": "demo-3m",
    "demo-3m-date": "demo-3m",
    "demo-3m-find": "demo-3m",
}
LONG = [n for n in BASES if n != "demo-1m-upper"]


@pytest.mark.parametrize(
    "name", ["demo-1m-upper", *(pytest.param(n, marks=pytest.mark.long) for n in LONG)]
)
def test_a_better_perplexity_does_not_erase_a_fine_tune(cli, tmp_path, name):
    for model in (BASES[name], name):
        cli.ok("hf", ROOT / "examples" / "models" / model, "--name", model)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    (tmp_path / "text.txt").write_text("\n".join(p.read_text(encoding="utf-8") for p in pages))
    found = json.loads(
        cli.ok("equivalence", name, "--text", tmp_path / "text.txt", "--tokens", 4096, "--policy",
               "near", "--threshold", "perplexity_change=0.01", "--suffix", ".near", "--json")
    )  # fmt: skip
    assert found["edges"] and not found["recommended"]
    better = [e for e in found["edges"] if e["scores"]["perplexity_change"]["high"] < 0]
    assert better  # the base is better on text, and still
    assert not any(e["usable"] for e in found["edges"])
    assert name + ".near" not in Zoo.open(cli.zoo).chains()
