"""What a front end needs to know of the chains that an engine serves."""

from collections.abc import Sequence

from jblock.engine.api import ModelInfo
from jblock.engine.graph.graph import ServingGraph
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
        )
        for name, route in sorted(graph.routes.items())
    )
