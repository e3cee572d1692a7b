"""What a front end needs to know of the chains that an engine serves."""

from collections.abc import Sequence

from jblock.engine.api import ModelInfo
from jblock.engine.graph.graph import Route, ServingGraph
from jblock.engine.runner.runner import Runner
from jblock.zoo.store import Zoo


def model_infos(
    zoo: Zoo, graph: ServingGraph, device: Runner, before: Sequence[ModelInfo] = ()
) -> tuple[ModelInfo, ...]:
    """One record a chain, by name. Tokenizers of chains in `before` are not looked for in the zoo again, so a
    chain can be taken away while the zoo is."""
    served = {(m.name, m.version): m.tokenizer_path for m in before}
    paths: dict[str, str] = {}
    for route in graph.routes.values():
        tokenizer = route.chain.tokenizer
        if tokenizer is not None and tokenizer not in paths:
            known = served.get((route.chain.name, route.chain.version))
            paths[tokenizer] = known or str(zoo.tokenizer_path(tokenizer))
    config, placement = device.config, device.placement
    count, kind = len(placement.devices), placement.platform.kind or placement.platform.name
    where = f"{count} x {kind}" if count > 1 else kind
    runs_on = f"{config.dtype} weights and {config.kv_dtype} KV on {where}"
    return tuple(
        ModelInfo(
            name=name,
            version=route.chain.version,
            family=route.chain.family,
            vocab_size=route.chain.vocab_size,
            max_model_len=device.max_model_len(route),
            tokenizer_path=paths.get(route.chain.tokenizer or "", ""),
            base=route.chain.base or "",
            blocks=len(route.instances),
            shared_blocks=sum(graph.users[i] > 1 for i in route.instances),
            policy=route.chain.policy,
            limited_by=_limited_by(device, route),
            kv_tokens=_kv_tokens(device, route),
            runs_on=runs_on,
        )
        for name, route in sorted(graph.routes.items())
    )


def _kv_tokens(device: Runner, route: Route) -> int:
    """Tokens of sequences on a route that the pools hold, were there no others; 0 without KV."""
    pools = device.pool_shapes
    pages = [(pools[s].num_pages - 1) // len(d) for s, d in route.kv_digests.items()]
    return min(pages, default=0) * device.config.page_size


def _limited_by(device: Runner, route: Route) -> str:
    """What the longest sequence comes from: see `ModelInfo`."""
    most = device.max_model_len(route) + route.virtual_tokens
    if most >= route.chain.max_position:
        return "its own"
    by_memory = device.context_by_memory or most < device.config.max_model_len
    return "KV memory" if by_memory else "max_model_len"
