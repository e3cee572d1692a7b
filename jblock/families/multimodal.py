"""Multimodal architectures whose text model is served: where its config and its tensors are.

Text alone gives every section of a sectioned rope ("mrope", Qwen VL) the same positions, so there it is the
plain rotary embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jblock.families.config import ConfigError

Config = Mapping[str, Any]

# Start of a tensor's name in a multimodal checkpoint -> in that of its text model; the first that fits.
# transformers 4 and 5 differ in where the text model stands.
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
# Starts of names of the other parts.
OTHER_PREFIXES = tuple(
    f"{inner}{part}."
    for inner in ("", "model.")
    for part in ("vision_tower", "vision_model", "visual", "multi_modal_projector")
)
_FROM_OUTSIDE = ("eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """One multimodal architecture.

    Attributes:
      architectures: values of config.json's `architectures` it covers.
      model_types: values of `model_type` it covers when `architectures` is not given.
      texts: `model_type` of the text model -> its architecture; the first is meant where none is given.
      defaults: fields of the text model -> what a config without them means.
      flat: the fields of the text model may stand beside `vision_config`, as in older configs.
    """

    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    texts: Mapping[str, str]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flat: bool = False


WRAPPERS = (
    Wrapper(
        architectures=("Gemma3ForConditionalGeneration",),
        model_types=("gemma3",),
        texts={"gemma3_text": "Gemma3ForCausalLM"},
        # The smaller releases leave these out.
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "max_position_embeddings": 131072,
        },
    ),
    Wrapper(
        architectures=("Mistral3ForConditionalGeneration",),
        model_types=("mistral3",),
        texts={"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    ),
    Wrapper(
        architectures=("Qwen2_5_VLForConditionalGeneration",),
        model_types=("qwen2_5_vl",),
        texts={"qwen2_5_vl_text": "Qwen2ForCausalLM", "qwen2_5_vl": "Qwen2ForCausalLM"},
        defaults={"rope_theta": 1e6, "max_position_embeddings": 32768},
        flat=True,
    ),
    Wrapper(
        architectures=("Qwen3VLForConditionalGeneration",),
        model_types=("qwen3_vl",),
        texts={"qwen3_vl_text": "Qwen3ForCausalLM"},
        defaults={"rope_theta": 5e5, "max_position_embeddings": 128000},
    ),
)


def wrapper_of(config: Config) -> Wrapper | None:
    """The multimodal architecture of a config; None: it is none of them."""
    names = config.get("architectures") or []
    for wrapper in WRAPPERS:
        if isinstance(names, list) and names[:1] and names[0] in wrapper.architectures:
            return wrapper
        if not names and config.get("model_type") in wrapper.model_types:
            return wrapper
    return None


def text_config(config: Config, wrapper: Wrapper) -> dict[str, Any]:
    """The config of the text model, as that model published alone would have it.

    `tie_word_embeddings` stands in it only if the config says it.

    Raises:
      ConfigError: no text model, or one that is not known.
    """
    inner = config.get("text_config")
    if inner is None and wrapper.flat:
        inner = {k: v for k, v in config.items() if k not in ("vision_config", "architectures")}
    if not isinstance(inner, dict):
        raise ConfigError(
            f"config.json: text_config is {inner!r}; {wrapper.architectures[0]} needs an object with the "
            "fields of its text model"
        )
    kind = inner.get("model_type") or next(iter(wrapper.texts))
    if kind not in wrapper.texts:
        raise ConfigError(
            f"config.json: text_config.model_type is {kind!r}; in {wrapper.architectures[0]} served: "
            f"{', '.join(map(repr, wrapper.texts))}"
        )
    sections = {
        field: _without_sections(inner[field])
        for field in ("rope_parameters", "rope_scaling")
        if isinstance(inner.get(field), dict)
    }
    defaults = dict(wrapper.defaults)
    if any("rope_theta" in section for section in sections.values()):
        defaults.pop("rope_theta", None)
    text = {**defaults, **inner, **sections, "architectures": [wrapper.texts[kind]]}
    text.pop("model_type", None)
    for field in _FROM_OUTSIDE:
        if text.get(field) is None and config.get(field) is not None:
            text[field] = config[field]
    for field in ("tie_word_embeddings", "quantization_config"):
        if config.get(field) is not None:
            text[field] = config[field]
    return text


def text_name(name: str) -> str | None:
    """The name that a tensor has in the text model alone; None: it belongs to another part."""
    for prefix, plain in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return None if name.startswith(OTHER_PREFIXES) else name


def _without_sections(section: Mapping[str, Any]) -> dict[str, Any]:
    """Rope fields without the sections of a position in pictures."""
    plain = {k: v for k, v in section.items() if k not in ("mrope_section", "mrope_interleaved")}
    return {
        k: "default" if k in ("type", "rope_type") and v == "mrope" else v for k, v in plain.items()
    }
