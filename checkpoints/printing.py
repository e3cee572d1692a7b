"""What commands print for people. The data is `jblock.zoo.inventory`'s."""

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from checkpoints.progress import size
from jblock.zoo.records import printable

__all__ = ["size"]


def table(*columns: str) -> Table:
    """A table whose cells are broken over lines where the terminal is too narrow, never cut."""
    made = Table(box=None)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def console() -> Console:
    """Where tables go: as wide as the terminal, and in a pipe or a file as wide as they are. Brackets and
    colons in names are just that."""
    width = None if sys.stdout.isatty() else 100_000
    return Console(width=width, markup=False, emoji=False)


def print_chains(data: dict[str, Any]) -> None:
    """A line for each chain, and the totals."""
    rows = [("model", "policy", "date", "source", "revision", "license", "base", "logical", "own")]
    for row in data["chains"]:
        origin = row["origin"]
        rows.append(
            (
                f"{row['name']}@{row['version']}" + ("" if row["active"] else " (not active)"),
                row["policy"],
                origin.get("date", "")[:10],
                origin.get("source", ""),
                origin.get("revision", "")[:12],
                origin.get("license", ""),
                row["base"] or row["made_from"] or "",
                size(row["logical_bytes"]),
                size(row["own_bytes"]),
            )
        )
    # Thousands of rows: laying them out cell by cell, as `table` does, takes a minute.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:<{width}}}" for width in widths).format
    print("\n".join(form(*row).rstrip() for row in rows))
    print(_totals(data["totals"]))


def _totals(totals: dict[str, Any]) -> str:
    return (
        f"{totals['components']} components, {totals['deltas']} deltas: "
        f"{size(totals['stored_bytes'])} stored for {size(totals['logical_bytes'])} of models"
    )


def print_history(data: dict[str, Any]) -> None:
    """A line for everything that was done to a model, and its versions."""
    rows = table("time", "user", "action", "version", "active then", "from")
    for line in data["history"]:
        known = [f"{k} {line[k]}" for k in ("source", "revision", "license", "alias") if k in line]
        fields = [str(line.get(k) or "") for k in ("time", "user", "action", "version", "active")]
        rows.add_row(*map(printable, (*fields, ", ".join(known))))
    out = console()
    out.print(rows)
    for row in data["versions"]:
        names = [a for a, v in data["aliases"].items() if v == row["version"]]
        state = ["active"] if row["version"] == data["active"] else []
        notes = f" ({', '.join([*state, *names])})" if state or names else ""
        digest = f": {row['digest'][:16]}" if row["digest"] else ""
        out.print(f"{data['name']}@{row['version']}{notes}{digest}", highlight=False)


def print_inventory(data: dict[str, Any], name: str | None, details: bool) -> None:
    """The conclusion about one model or the whole zoo; with details every component."""
    if name is None:
        print_chains(data)
    else:
        row = data["chains"][0]
        own = {f"{row['name']}@{row['version']}"}
        parts = (*data["components"], *data["deltas"])
        shared = [set(part["used_by"]) - own for part in parts]
        print(
            f"{row['name']}@{row['version']}: {row['family']}, policy {row['policy']}"
            + (f", on {row['base']}" if row["base"] else "")
            + (f", made from {row['derived']['chain']}" if "chain" in row["derived"] else "")
        )
        print(
            f"{size(row['logical_bytes'])}, of which {size(row['own_bytes'])} are its own: "
            + _shared_with(shared, "components and deltas")
        )
        print(
            f"{row['blocks']} blocks, context {row['max_position']}, vocabulary {row['vocab_size']}"
        )
        origin = [f"{k} {v}" for k, v in row["origin"].items()]
        if origin:
            print("from " + ", ".join(origin).removeprefix("source "))
    if details:
        print_components(data)


def _shared_with(users: list[set[str]], what: str) -> str:
    """How many of some parts others use too, and who most."""
    shared = [u for u in users if u]
    if not shared:
        return f"none of its {len(users)} {what} is shared"
    counts: dict[str, int] = {}
    for names in shared:
        for name in names:
            counts[name] = counts.get(name, 0) + 1
    first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count} with {name}" for name, count in first[:3])
    more = f" and {len(first) - 3} others" if len(first) > 3 else ""
    return f"{len(shared)} of {len(users)} {what} are shared ({named}{more})"


def print_components(data: dict[str, Any]) -> None:
    """A line for each component and delta: its kind, size, and who uses it."""
    rows = table("id", "kind", "stored", "used by")
    for entry in (*data["components"], *data["deltas"]):
        users = entry["used_by"]
        shown = ", ".join(users[:4]) + (f" and {len(users) - 4} more" if len(users) > 4 else "")
        rows.add_row(entry["id"][:12], entry["kind"], size(entry["nbytes"]), shown or "nobody")
    console().print(rows)


def print_edges(data: dict[str, Any]) -> None:
    """A line for each edge: what may replace what, what was measured, and whether it may be used."""
    rows = table("id", "kind", "original", "substitute", "in", "scores", "usable")
    for row in data["edges"]:
        rows.add_row(
            row["id"][:12],
            row["kind"],
            *(" ".join(_step(s) for s in row[side]) for side in ("original", "substitute")),
            row["chain"] or "",
            ", ".join(f"{name} {_score(s)}" for name, s in row["scores"].items()),
            "yes" if row["usable"] else f"no: {row['reasons'][0]}",
        )
    console().print(rows)
    print(f"{data['usable']} of {len(data['edges'])} edges usable")


def print_equivalence(data: dict[str, Any]) -> None:
    """Candidates, what was measured of them in place, and what is recommended."""
    rows = table("original", "substitute", "size", "cosine", "least of a tensor", "used by")
    for row in data["candidates"]:
        least = min(row["cosines"].items(), key=lambda item: item[1], default=None)
        rows.add_row(
            row["original"][:12],
            row["substitute"][:12],
            size(row["nbytes"]),
            f"{row['cosine']:.5f}",
            "not compared" if least is None else f"{least[1]:.5f} ({least[0]})",
            ", ".join(row["used_by"][:3]),
        )
    console().print(rows)
    print_edges({"edges": data["edges"], "usable": sum(e["usable"] for e in data["edges"])})
    for row in data["recommended"]:
        scores = ", ".join(f"{n} {_score(s)}" for n, s in row["scores"].items())
        published = f", published as {row['published']}" if "published" in row else ""
        print(f"{row['chain']}: {_places(row)}: {scores}{published}")
    for row in data["rejected"]:
        print(
            f"{row['chain']}: {_places(row)}: chosen on the first half of the probe, not confirmed by the "
            f"second: {'; '.join(row['reasons'])}"
        )
    for row in data["skipped"]:
        print(f"{row['chain']} was not measured: {row['reason']}")
    print(
        f"{data['components']} components, {data['alike']} pairs of like sketches, "
        f"{len(data['candidates'])} candidates; the recommended free {size(data['freed_bytes'])}"
    )


def print_measured(data: dict[str, Any]) -> None:
    """One model beside another."""
    rows = table("model", "perplexity", "accuracy")
    for i, name in enumerate((data["model"], data["against"])):
        accuracy = data["accuracy"][i]
        shown = "" if accuracy is None else f"{accuracy:.4f}"
        rows.add_row(name, f"{data['perplexity'][i]:.3f}", shown)
    console().print(rows)
    for name, score in data["scores"].items():
        print(f"{name} {_score(score)}")
    usable = "usable" if data["usable"] else "not usable: " + "; ".join(data["reasons"])
    print(f"edge {data['edge'][:12]}, {data['kind']}: {usable}")


def print_approximate(data: dict[str, Any]) -> None:
    """The models that were made beside those they come from, and what they cost."""
    rows = table("model", "perplexity", "accuracy", "beside", "scores")
    for row in (*data["parents"], *data["models"]):
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        rows.add_row(row["name"], f"{row['perplexity']:.3f}", accuracy, "", "")
        for parent, scores in row.get("beside", {}).items():
            found = ", ".join(f"{name} {_score(s)}" for name, s in scores.items())
            rows.add_row("", "", "", parent, found)
    console().print(rows)
    if "parameters" in data:
        counts = data["parameters"]
        share = counts["surrogate"] / counts["original"]
        print(f"{counts['surrogate']} of {counts['original']} parameters: {share:.3f}")
    else:
        print(f"stitch {data['stitch'][:12]}: {size(data['bytes'])}")


def _places(row: dict[str, Any]) -> str:
    if row["steps"] is None:
        return "another model"
    return "steps " + ", ".join(map(str, row["steps"]))


def _step(step: dict[str, Any]) -> str:
    return "+".join(i[:8] for i in (step["component"], *step["deltas"]))


def _score(score: dict[str, Any]) -> str:
    low, high = score["low"], score["high"]
    if low is None or high is None:
        return f"{score['value']:.4g}"
    return f"{score['value']:.4g} ({low:.4g} to {high:.4g})"


def print_diff(data: dict[str, Any]) -> None:
    """A line for each step of two models that is not the same in both, and the totals."""
    rows = table("step", "kind", "state", data["a"], data["b"], "largest difference")
    for row in data["steps"]:
        if row["state"] == "equal" and row["same_deltas"]:
            continue
        state = row["state"]
        if state == "equal":
            state = "other deltas"
        most = f"{row['max_difference']:.3g} ({row['tensor']})" if "tensor" in row else ""
        index = row["a"] if row["a"] is not None else row["b"]
        sizes = [size(row[f"{k}_bytes"] + row[f"{k}_delta_bytes"]) for k in ("a", "b")]
        rows.add_row(str(index), row["kind"], state, *sizes, most)
    if rows.row_count:
        console().print(rows)
    totals = data["totals"]
    print(
        f"{totals['equal']} components equal ({size(totals['equal_bytes'])}), {totals['changed']} "
        f"changed, {totals['other']} without a counterpart"
    )


def print_plan(data: dict[str, Any], details: bool) -> None:
    """What would be stored, shared and cut; with details every component and the reason of every cut."""
    shared = [set(row["shared_with"]) for row in data["steps"]]
    print(
        f"{data['name']}: {size(data['stored_bytes'])} of {size(data['logical_bytes'])} would be stored; "
        + _shared_with(shared, "components and deltas")
    )
    blocks = data["blocks"]
    of_others = sum(bool(row["shared_with"]) for row in blocks)
    cost = data["cost"]
    print(
        f"{len(blocks)} blocks, {of_others} of them shared, cut "
        + (
            f"by measured cost: {1e6 * cost['hop_seconds']:.0f} us a hand-over, "
            f"{cost['bytes_per_second'] / 1e9:.1f} GB/s of weights"
            if cost
            else "so that all sharing is kept: hand-overs were not measured here ('jblock convert profile')"
        )
    )
    for row in data["cut_elsewhere"]:
        print(f"{row['name']}: {row['blocks_before']} blocks become {row['blocks_after']}")
    if not details:
        return
    stored = table("step", "kind", "size", "stored", "shared with")
    for row in data["steps"]:
        users = ", ".join(row["shared_with"][:3])
        stored.add_row(
            str(row["step"]), row["kind"], size(row["bytes"]), "new" if row["stored"] else "", users
        )
    console().print(stored)
    cut = table("block", "size", "shared with", "cut because")
    for row in blocks:
        users = ", ".join(row["shared_with"][:3])
        cut.add_row(f"{row['first']}-{row['last']}", size(row["bytes"]), users, row["why"])
    console().print(cut)


def print_profile(data: dict[str, Any]) -> None:
    """A line for each signature and grid."""
    rows = table("signature", "size", "load", "sequences", "tokens", "time")
    for row in data["signatures"]:
        for t in row["times"]:
            rows.add_row(
                row["signature"],
                size(row["bytes"]),
                f"{1e3 * row['load_seconds']:.1f} ms",
                str(t["num_seqs"]),
                str(t["q_len"]),
                f"{1e6 * t['seconds']:.0f} us",
            )
    console().print(rows)
    print(
        f"{data['target']}: {1e6 * data['hop_seconds']:.0f} us a hand-over, "
        f"{data['bytes_per_second'] / 1e9:.2f} GB/s of weights"
    )
