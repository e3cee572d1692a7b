"""What a call took, as OpenAI counts it."""

from typing import Any

from serving.answers import Part, Usage


def usage_of(usage: Usage) -> dict[str, int]:
    """The object `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def note_bound(head: dict[str, Any], part: Part) -> None:
    """Puts what stands for the model's own blocks, if a part says so, where every event has it."""
    bound = part.output.bound
    if bound is not None:
        head["policy"] = part.model.policy
        head["assembly"] = {
            "served_as": bound.served_as,
            "measure": bound.measure,
            "damage": bound.damage,
        }
