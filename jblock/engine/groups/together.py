"""What several engines that serve the same chains answer as one. Nothing here imports jax."""

import dataclasses
from collections.abc import Iterable, Sequence

from jblock.engine.api import Engine, EngineStats, ModelInfo

# What lies on some agent of a pipeline; other counters and gauges are its home's.
_LIE_ON_AGENTS = (
    "resident_bytes",
    "host_bytes",
    "compiles_on_serving_path",
    "compiles_in_background",
    "pages_free",
    "pages_total",
    "restarts",
)


def models_of_all(engines: Iterable[Engine]) -> tuple[ModelInfo, ...]:
    """The first engine's chains, each with the length that every engine can serve."""
    first, *others = [engine.models() for engine in engines]
    lengths = [{info.name: info.max_model_len for info in models} for models in others]
    return tuple(
        dataclasses.replace(
            info, max_model_len=min(of.get(info.name, info.max_model_len) for of in (*lengths, {}))
        )
        for info in first
    )


def serve_on_all(
    engines: Iterable[Engine], models: Sequence[str], base: Sequence[str] | None
) -> None:
    """Serves exactly these chains on each engine, one after another; see `Engine.serve`. Where one cannot,
    those before it go back.

    Raises:
      UnknownChain, ValueError, EngineDied: an engine refused, or died over it; nothing changed on the others.
    """
    changed: list[tuple[Engine, list[str]]] = []
    try:
        for engine in engines:
            before = [f"{m.name}@{m.version}" for m in engine.models()]
            engine.serve(models, base)
            changed.append((engine, before))
    except Exception:
        for engine, before in changed:
            engine.serve(before)
        raise


def stats_of_pipeline(home: EngineStats, *others: EngineStats) -> EngineStats:
    """Counters and gauges of the home; what lies on agents, of all of them."""
    every = (home, *others)
    sums = {name: sum(getattr(s, name) for s in every) for name in _LIE_ON_AGENTS}
    return dataclasses.replace(home, **sums)
