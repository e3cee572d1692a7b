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
            row["base"] or "",
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
