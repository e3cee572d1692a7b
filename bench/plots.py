"""Drawings of what a scenario measured. Needs matplotlib, which only the extra `plot` brings."""


def require() -> None:
    """Raises SystemExit when matplotlib is not installed, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise SystemExit("--plot needs matplotlib: pip install 'jblock[plot]'") from e
