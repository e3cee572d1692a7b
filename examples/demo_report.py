"""What the demo says at its end: a table, a few sentences, one line of JSON."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints.printing import size
from examples.demo_load import Answer
from examples.demo_reference import Verdict, compare
from serving.values import Model

_SHOWN_PROBLEMS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that was measured.

    Attributes:
      family: all entries of family.json, by name.
      models: what the server says of them.
      answers: to all requests.
      seconds: from the first request to the last answer.
      warm_up_seconds: from the server's start until it answered.
      totals: "logical_bytes" and "stored_bytes" of the models.
      counters: what the engine counted between first request and last answer, by name.
    """

    family: Mapping[str, Mapping[str, Any]]
    models: Sequence[Model]
    answers: Sequence[Answer]
    seconds: float
    warm_up_seconds: float
    totals: Mapping[str, int]
    counters: Mapping[str, float]

    def verdicts(self) -> list[tuple[Answer, Verdict]]:
        """Answers that came, each held against the reference."""
        return [
            (a, compare(a.item, a.token_ids, a.finish_reason, a.text))
            for a in self.answers
            if not a.error
        ]


def summary(run: Run) -> dict[str, Any]:
    """The numbers of the last line."""
    verdicts = run.verdicts()
    counters = collections.Counter(run.counters)
    return {
        "tenants": len(run.models),
        "requests": len(run.answers),
        "failed": sum(bool(a.error) for a in run.answers),
        "mismatched": sum(not v.same for _, v in verdicts),
        "near_ties": sum(v.same and v.position is not None for _, v in verdicts),
        "logical_bytes": run.totals["logical_bytes"],
        "stored_bytes": run.totals["stored_bytes"],
        "rows_per_block_call": _ratio(counters["block_rows"], counters["block_calls"]),
        "rows_per_model_call": _ratio(counters["model_rows"], counters["model_calls"]),
        "tokens_per_second": round(_tokens(run.answers) / run.seconds, 1),
        "p50_ms": _percentile([a.total_ms for a, _ in verdicts], 50),
        "p95_ms": _percentile([a.total_ms for a, _ in verdicts], 95),
        "first_token_p50_ms": _percentile([a.first_token_ms for a, _ in verdicts], 50),
        "warm_up_seconds": round(run.warm_up_seconds, 1),
        "compiles_on_serving_path": int(counters["compiles_on_serving_path"]),
    }


def show(run: Run, console: Console) -> None:
    """Prints the table, the sentences, and what went wrong."""
    numbers = summary(run)
    console.print()
    console.print(_table(run))
    console.print()
    for line in _sentences(numbers, run.seconds):
        console.print(line, highlight=False)
    problems = [(a, a.error) for a in run.answers if a.error]
    problems += [(a, v.reason) for a, v in run.verdicts() if not v.same]
    for answer, reason in problems[:_SHOWN_PROBLEMS]:
        how = "text" if answer.as_text else "token ids"
        console.print(
            f"PROBLEM: {answer.item.model}, prompt {answer.item.prompt[:60]!r} (sent as {how}): "
            f"{reason}",
            highlight=False,
            markup=False,
        )
    if len(problems) > _SHOWN_PROBLEMS:
        console.print(f"... and {len(problems) - _SHOWN_PROBLEMS} more", highlight=False)


def _table(run: Run) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model")
    table.add_column("made by")
    for name in ("blocks\nshared", "answers\nright", "same as\ntransformers", "tokens\na second"):
        table.add_column(name, justify="right")
    for name in ("p50\nms", "p95\nms"):
        table.add_column(name, justify="right")
    by_model = collections.defaultdict(list)
    for answer, verdict in run.verdicts():
        by_model[answer.item.model].append((answer, verdict))
    asked = collections.Counter(a.item.model for a in run.answers)
    for model in run.models:
        pairs = by_model[model.name]
        answers = [a for a, _ in pairs]
        times = [a.total_ms for a in answers]
        tasks = [a for a in answers if a.item.expected is not None]
        right = sum(a.text == a.item.expected and a.finish_reason == "stop" for a in tasks)
        table.add_row(
            model.name,
            _made_by(run.family, model.name),
            f"{model.shared_blocks} of {model.blocks}",
            f"{right} of {len(tasks)}" if tasks else "-",
            f"{sum(v.same for _, v in pairs)} of {asked[model.name]}",
            f"{_tokens(answers) / run.seconds:.0f}",
            f"{_percentile(times, 50):.0f}",
            f"{_percentile(times, 95):.0f}",
        )
    return table


def _sentences(numbers: Mapping[str, Any], seconds: float) -> list[str]:
    logical, stored = numbers["logical_bytes"], numbers["stored_bytes"]
    ties = numbers["near_ties"]
    return [
        f"Requests:  {numbers['requests']} in {seconds:.1f} s, {numbers['failed']} failed, "
        f"{numbers['mismatched']} differ from transformers"
        + (f" ({ties} parted at a near tie, where both are right)" if ties else ""),
        f"Storage:   {size(stored)} for {numbers['tenants']} models that take {size(logical)} as "
        f"separate checkpoints: {logical / stored:.1f} times less",
        f"Batching:  {numbers['rows_per_block_call']} rows in a mean call of a block; a server of "
        f"one model each would have had {numbers['rows_per_model_call']}",
        f"Programs:  {numbers['compiles_on_serving_path']} compiled while a request waited "
        "(should be 0)",
    ]


def _made_by(family: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """How a member of the family came to be."""
    entry = family[name]
    if entry["kind"] == "lora":
        return f"LoRA, rank {entry['rank']}"
    if entry["kind"] == "frozen":
        layers = family[entry["base"]]["layers"]
        return f"tuning {layers - len(entry['frozen_layers'])} of {layers} layers"
    return {"base": "pretraining", "full": "tuning all weights"}.get(entry["kind"], entry["kind"])


def _tokens(answers: Sequence[Answer]) -> int:
    return sum(len(a.token_ids) for a in answers)


def _ratio(rows: float, calls: float) -> float:
    return round(rows / calls, 2) if calls else 0.0


def _percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return round(sum(values), 1)
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 1)
