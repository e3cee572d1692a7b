"""What `list` and `inspect` print on a terminal. The data is `jblock.zoo.inventory`'s."""

from typing import Any

from rich.console import Console
from rich.table import Table


def size(nbytes: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def print_chains(data: dict[str, Any]) -> None:
    """A line for each chain, and the totals."""
    table = Table("model", "family", "base", "components", "logical", "own", box=None)
    for row in data["chains"]:
        table.add_row(
            f"{row['name']}@{row['version']}" + ("" if row["live"] else " (old)"),
            row["family"],
            row["base"] or row["derived"].get("chain", ""),
            str(len(row["steps"])),
            size(row["logical_bytes"]),
            size(row["own_bytes"]),
        )
    console = Console()
    console.print(table)
    totals = data["totals"]
    console.print(
        f"{totals['components']} components, {totals['deltas']} deltas: "
        f"{size(totals['stored_bytes'])} stored for {size(totals['logical_bytes'])} of models",
        highlight=False,
    )


def print_components(data: dict[str, Any]) -> None:
    """A line for each component and delta: its kind, size, and who uses it."""
    table = Table("id", "kind", "stored", "used by", box=None)
    for entry in (*data["components"], *data["deltas"]):
        users = entry["used_by"]
        shown = ", ".join(users[:4]) + (f" and {len(users) - 4} more" if len(users) > 4 else "")
        table.add_row(entry["id"][:12], entry["kind"], size(entry["nbytes"]), shown or "nobody")
    Console().print(table)


def print_edges(data: dict[str, Any]) -> None:
    """A line for each edge: what may replace what, what was measured, and whether it may be used."""
    table = Table("id", "kind", "original", "substitute", "in", "scores", "usable", box=None)
    for row in data["edges"]:
        table.add_row(
            row["id"][:12],
            row["kind"],
            *(" ".join(_step(s) for s in row[side]) for side in ("original", "substitute")),
            row["chain"] or "",
            ", ".join(f"{name} {_score(s)}" for name, s in row["scores"].items()),
            "yes" if row["usable"] else f"no: {row['reasons'][0]}",
        )
    console = Console()
    console.print(table)
    console.print(f"{data['usable']} of {len(data['edges'])} edges usable", highlight=False)


def print_equivalence(data: dict[str, Any]) -> None:
    """Candidates, what was measured of them in place, and what is recommended."""
    console = Console()
    table = Table(
        "original", "substitute", "size", "cosine", "least of a tensor", "used by", box=None
    )
    for row in data["candidates"]:
        name, least = min(row["cosines"].items(), key=lambda item: item[1])
        table.add_row(
            row["original"][:12],
            row["substitute"][:12],
            size(row["nbytes"]),
            f"{row['cosine']:.5f}",
            f"{least:.5f} ({name})",
            ", ".join(row["used_by"][:3]),
        )
    console.print(table)
    print_edges({"edges": data["edges"], "usable": sum(e["usable"] for e in data["edges"])})
    for row in data["recommended"]:
        scores = ", ".join(f"{n} {_score(s)}" for n, s in row["scores"].items())
        places = ", ".join(map(str, row["steps"]))
        published = f", published as {row['published']}" if "published" in row else ""
        console.print(f"{row['chain']}: steps {places}: {scores}{published}", highlight=False)
    console.print(
        f"{data['components']} components, {data['alike']} pairs of like sketches, "
        f"{len(data['candidates'])} candidates; the recommended free {size(data['freed_bytes'])}",
        highlight=False,
    )


def print_approximate(data: dict[str, Any]) -> None:
    """The models that were made beside those they come from, and what they cost."""
    table = Table("model", "perplexity", "accuracy", "beside", "scores", box=None)
    for row in (*data["parents"], *data["models"]):
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        table.add_row(row["name"], f"{row['perplexity']:.3f}", accuracy, "", "")
        for parent, scores in row.get("beside", {}).items():
            found = ", ".join(f"{name} {_score(s)}" for name, s in scores.items())
            table.add_row("", "", "", parent, found)
    console = Console()
    console.print(table)
    if "parameters" in data:
        counts = data["parameters"]
        share = counts["surrogate"] / counts["original"]
        console.print(
            f"{counts['surrogate']} of {counts['original']} parameters: {share:.3f}",
            highlight=False,
        )
    else:
        console.print(f"stitch {data['stitch'][:12]}: {size(data['bytes'])}", highlight=False)


def _step(step: dict[str, Any]) -> str:
    return "+".join(i[:8] for i in (step["component"], *step["deltas"]))


def _score(score: dict[str, Any]) -> str:
    low, high = score["low"], score["high"]
    if low is None or high is None:
        return f"{score['value']:.4g}"
    return f"{score['value']:.4g} ({low:.4g} to {high:.4g})"


def print_diff(data: dict[str, Any]) -> None:
    """A line for each step of two models that is not the same in both, and the totals."""
    table = Table("step", "kind", "state", data["a"], data["b"], "largest difference", box=None)
    for row in data["steps"]:
        if row["state"] == "equal" and row["same_deltas"]:
            continue
        state = row["state"]
        if state == "equal":
            state = "other deltas"
        most = f"{row['max_difference']:.3g} ({row['tensor']})" if "tensor" in row else ""
        index = row["a"] if row["a"] is not None else row["b"]
        sizes = [size(row[f"{k}_bytes"] + row[f"{k}_delta_bytes"]) for k in ("a", "b")]
        table.add_row(str(index), row["kind"], state, *sizes, most)
    console = Console()
    if table.row_count:
        console.print(table)
    totals = data["totals"]
    console.print(
        f"{totals['equal']} components equal ({size(totals['equal_bytes'])}), {totals['changed']} "
        f"changed, {totals['other']} without a counterpart",
        highlight=False,
    )


def print_plan(data: dict[str, Any]) -> None:
    """What would be stored, and the blocks with the reason for each cut."""
    console = Console()
    stored = Table("step", "kind", "size", "stored", "shared with", box=None)
    for row in data["steps"]:
        users = ", ".join(row["shared_with"][:3])
        stored.add_row(
            str(row["step"]), row["kind"], size(row["bytes"]), "new" if row["stored"] else "", users
        )
    console.print(stored)
    cut = Table("block", "size", "shared with", "cut because", box=None)
    for row in data["blocks"]:
        users = ", ".join(row["shared_with"][:3])
        cut.add_row(f"{row['first']}-{row['last']}", size(row["bytes"]), users, row["why"])
    console.print(cut)
    for row in data["cut_elsewhere"]:
        console.print(
            f"{row['name']}: {row['blocks_before']} blocks become {row['blocks_after']}",
            highlight=False,
        )
    cost = data["cost"]
    console.print(
        f"cut by measured cost: {1e6 * cost['hop_seconds']:.0f} us a hand-over, "
        f"{cost['bytes_per_second'] / 1e9:.1f} GB/s of weights"
        if cost
        else "all sharing is kept: hand-overs were not measured here ('jblock-convert profile')",
        highlight=False,
    )
    console.print(
        f"{size(data['stored_bytes'])} of {size(data['logical_bytes'])} would be stored",
        highlight=False,
    )


def print_profile(data: dict[str, Any]) -> None:
    """A line for each signature and grid."""
    table = Table("signature", "size", "load", "sequences", "tokens", "time", box=None)
    for row in data["signatures"]:
        for t in row["times"]:
            table.add_row(
                row["signature"],
                size(row["bytes"]),
                f"{1e3 * row['load_seconds']:.1f} ms",
                str(t["num_seqs"]),
                str(t["q_len"]),
                f"{1e6 * t['seconds']:.0f} us",
            )
    console = Console()
    console.print(table)
    console.print(
        f"{data['target']}: {1e6 * data['hop_seconds']:.0f} us a hand-over, "
        f"{data['bytes_per_second'] / 1e9:.2f} GB/s of weights",
        highlight=False,
    )
