"""Placement: which blocks lie on which agents, and by which of them each chain goes (docs/placement.md)."""

from jblock.scheduler.placement.records import (
    Agent,
    Block,
    Chain,
    Link,
    Links,
    Placement,
    PlacementError,
    Problem,
    Route,
    Span,
    Weights,
)
from jblock.scheduler.placement.search import place

__all__ = [
    "Agent",
    "Block",
    "Chain",
    "Link",
    "Links",
    "Placement",
    "PlacementError",
    "Problem",
    "Route",
    "Span",
    "Weights",
    "place",
]
