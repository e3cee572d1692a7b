"""What adding a chain would do to a zoo, and why: what is stored, what is shared, how it is cut."""

from collections.abc import Mapping, Sequence
from typing import Any

from jblock.zoo.partition import Block, BlockPlan, Run
from jblock.zoo.records import Chain


def cut_plan(
    plan: BlockPlan, chains: Mapping[str, Chain], name: str, nbytes: Mapping[str, int]
) -> list[dict[str, Any]]:
    """The blocks of one chain among the others, each with the reason for its first cut.

    Args:
      plan: of these chains.
      chains: all that are served together, `name` among them.
      name: the chain to explain.
      nbytes: bytes of its components.

    Returns:
      A dict a block: `first` and `last` step, `bytes`, `shared_with` (names), `gain_seconds` a step that
      sharing saves (None without a cost), `why`.
    """
    cost, users = plan.cost, plan.users
    rows = []
    previous: Block | None = None
    for block in plan.blocks[name]:
        others = sorted(set(users[block.components]) - {name})
        rows.append(
            {
                "first": block.first,
                "last": block.first + len(block.components) - 1,
                "bytes": sum(nbytes[i] for i in block.components),
                "shared_with": others,
                "gain_seconds": cost.gain(block.components, 1 + len(others)) if cost else None,
                "why": _why(
                    chains, name, users, previous, block, last=block == plan.blocks[name][-1]
                ),
            }
        )
        previous = block
    return rows


def _why(
    chains: Mapping[str, Chain],
    name: str,
    users: Mapping[Run, Sequence[str]],
    previous: Block | None,
    block: Block,
    last: bool,
) -> str:
    if previous is None:
        return "the embedding is always a block of its own"
    if last:
        return "the final norm and the head are always a block of their own"
    if previous.first == 0:
        return "the layers begin"
    here, before = set(users[block.components]), set(users[previous.components])
    joined, left = sorted(here - before), sorted(before - here)
    if joined:
        return f"from here on shared with {_names(joined)}"
    if left:
        return f"{_names(left)} {'parts' if len(left) == 1 else 'part'} here"
    others = sorted(
        k for k, c in chains.items() if k != name and _crosses(c, previous, block) and k not in here
    )
    if others:
        return f"{_names(others)} uses only one side of this cut"
    return "a component occurs more than once"


def _crosses(chain: Chain, previous: Block, block: Block) -> bool:
    ids = {s.component for s in chain.steps}
    return previous.components[-1] in ids or block.components[0] in ids


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
