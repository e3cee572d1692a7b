"""What a generation_config.json says: ids that end a generation, sampling defaults, and the rest by name."""

from collections.abc import Mapping
from typing import Any

from jblock.families.config import token_ids

# Sampling defaults, which a chain's record keeps; a request says how it samples.
_SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
)
# Decide nothing of what comes out.
_BOOKKEEPING = (
    *("_from_model_config", "transformers_version", "use_cache", "cache_implementation"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "trust_remote_code", "disable_compile", "compile_config"),
)
_OFF: tuple[Any, ...] = (None, False, 0, 1, [], {}, "", "never")  # as transformers means none


def sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults that a record keeps."""
    return {
        k: v for k, v in generation.items() if k in _SAMPLING and isinstance(v, (bool, int, float))
    }


def ignored(generation: Mapping[str, Any]) -> list[str]:
    """Fields that would change what transformers generates and nothing here reads, sorted."""
    known = (*_SAMPLING, *_BOOKKEEPING)
    return sorted(k for k, v in generation.items() if k not in known and v not in _OFF)


def ids(
    generation: Mapping[str, Any], config: Mapping[str, Any], field: str, vocab_size: int
) -> tuple[int, ...]:
    """The token ids of a field, of generation_config.json if it stands there, else of config.json.

    Raises:
      ConfigError: no ids, or some outside the vocabulary.
    """
    found = token_ids(generation, field, vocab_size, "generation_config.json")
    return found or token_ids(config, field, vocab_size)
