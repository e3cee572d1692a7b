"""Stands for `jblock.engine.factory:build_engine` where a test starts `jblock-serve`."""

from typing import Any

from jblock.engine.process import mock


def build_engine(*, zoo: str, **settings: Any) -> mock.MockEngine:
    """A mock; with the zoo "show" the settings, as an error."""
    if zoo == "show":
        raise ValueError(f"settings: {dict(sorted(settings.items()))}")
    return mock.build_engine(models=[{"name": "echo"}], step_delay=0.02)
