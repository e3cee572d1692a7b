"""What a call took, as OpenAI counts it."""

from serving.answers import Usage


def usage_of(usage: Usage) -> dict[str, int]:
    """The object `usage`."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
