"""Drawings of what a scenario measured. Needs matplotlib, which only the extra `plot` brings."""

from pathlib import Path
from typing import Any


def require(scenario: str) -> None:
    """Checks before anything is measured that the drawing can be made.

    Raises:
      SystemExit: matplotlib is not installed, or the scenario has no drawing.
    """
    if scenario not in _DRAWINGS:
        raise SystemExit(f"{scenario} draws nothing; --plot works with: {', '.join(_DRAWINGS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise SystemExit("--plot needs matplotlib: pip install 'jblock[plot]'") from e


def draw(scenario: str, result: dict[str, Any], path: Path) -> None:
    """Draws a scenario's result to a file; its ending names the format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    _DRAWINGS[scenario](axes, result)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sharing(axes, result: dict[str, Any]) -> None:
    curve = result["curve"]
    axes.plot(curve["rows"], curve["bound"], "o--", color="gray", label="bound: matmuls alone")
    axes.plot(curve["rows"], curve["ratio"], "o-", label="measured")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve["rows"], [str(r) for r in curve["rows"]])
    axes.set_xlabel("rows a model")
    axes.set_ylabel("decode tokens/s, shared over one model each")
    axes.set_ylim(bottom=0)
    axes.legend()


def _block_tax(axes, result: dict[str, Any]) -> None:
    tax = result["block_tax"]
    axes.bar(list(tax), list(tax.values()), width=0.5)
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_ylabel("decode step, through blocks over one program")


def _roofline(axes, result: dict[str, Any]) -> None:
    figures = result["roofline"]
    axes.barh(list(figures), list(figures.values()), height=0.5)
    axes.axvline(1.0, color="black", linewidth=0.5)
    axes.set_xlabel("fraction of what the machine allows")


def _deltas(axes, result: dict[str, Any]) -> None:
    codecs = {"low rank": "o", "bits": "s", "all": "^"}
    for i, model in enumerate(dict.fromkeys(r["model"] for r in result["compressed"])):
        for codec, marker in codecs.items():
            rows = [
                r
                for r in result["compressed"]
                if r["model"] == model and r["setting"].startswith(codec)
            ]
            changes = [r["accuracy_change"] for r in rows]
            axes.errorbar(
                [r["times_smaller"] for r in rows],
                [100 * c["value"] for c in changes],
                [
                    [100 * (c["value"] - c["low"]) for c in changes],
                    [100 * (c["high"] - c["value"]) for c in changes],
                ],
                fmt=f"{marker}-",
                color=f"C{i}",
                markersize=4,
                linewidth=0.8,
                label=f"{model}, {codec}",
            )
    axes.axhline(-1.0, color="black", linewidth=0.5)
    axes.axvline(8.0, color="black", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks([4, 8, 16], ["4", "8", "16"])
    axes.set_xlabel("times smaller changed components")
    axes.set_ylabel("change of accuracy in points")
    axes.legend(fontsize=6)


def _speculate(axes, result: dict[str, Any]) -> None:
    ramp = result["ramp"]
    axes.plot(ramp["rows"], ramp["drafts"], "o-", label="tokens drafted a row and step")
    axes.plot(ramp["rows"], ramp["speedup"], "s--", label="tokens a second, over none drafted")
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ramp["rows"], [str(r) for r in ramp["rows"]])
    axes.set_xlabel("sequences at a time")
    axes.set_ylim(bottom=0)
    axes.legend()


_DRAWINGS = {
    "deltas": _deltas,
    "sharing": _sharing,
    "block_tax": _block_tax,
    "roofline": _roofline,
    "speculate": _speculate,
}
