"""Architectures that are known and not served yet: their names, and what no component computes."""

from collections.abc import Mapping
from typing import Any

# Starts of architectures' names -> the models, and what they need.
_ARCHITECTURES = {
    "Llama4": ("Llama 4", "its chunked attention and its experts beside a shared one"),
    "Qwen3Next": ("Qwen3-Next", "its gated linear attention"),
    "Qwen3_5": ("Qwen 3.5", "its gated linear attention"),
    "Gemma3n": ("Gemma 3n", "its embeddings for each layer and its alternating updates"),
    "Gemma4": ("Gemma 4", "its embeddings for each layer and keys shared between layers"),
    "DeepseekV2": ("DeepSeek V2", "its latent attention (MLA)"),
    "DeepseekV3": ("DeepSeek V3 and R1", "its latent attention (MLA)"),
    "GptOss": ("gpt-oss", "its attention sinks and clamped experts"),
}
# The same for values of model_type.
_MODEL_TYPES = {
    "llama4": "Llama4",
    "llama4_text": "Llama4",
    "qwen3_next": "Qwen3Next",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5",
    "gemma3n": "Gemma3n",
    "gemma3n_text": "Gemma3n",
    "gemma4": "Gemma4",
    "gemma4_text": "Gemma4",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "gpt_oss": "GptOss",
}


def why_unserved(config: Mapping[str, Any]) -> str | None:
    """Why a known model is not served; None: it is not known."""
    names = config.get("architectures") or [_MODEL_TYPES.get(str(config.get("model_type")), "")]
    found = [a for a in _ARCHITECTURES if str(names[0]).startswith(a)]
    if not found:
        return None
    model, needs = _ARCHITECTURES[max(found, key=len)]
    return f"{model} is not served yet: no component computes {needs}"
