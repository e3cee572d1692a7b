"""jblock serves many fine-tuned language models by storing and running them as shared blocks."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`LLM`, which needs all of the rest, only where it is asked for."""
    if name == "LLM":
        from serving.offline import LLM

        return LLM
    raise AttributeError(f"module 'jblock' has no attribute {name!r}")
