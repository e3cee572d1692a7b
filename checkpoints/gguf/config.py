"""The config.json that the metadata of a GGUF file stands for.

Keys are those of the GGUF specification and of llama.cpp's convert_hf_to_gguf.py; what a file leaves out has
the value llama.cpp gives it (src/models/<architecture>.cpp, src/llama-hparams.h). Every key of the
architecture's own is read, or refused by name: none is passed over.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.errors import CheckpointError

# What a file calls its architecture -> architecture and model type of transformers.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
# Layers of the one model of each family whose scores are scaled by the width of all heads together.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
_NO_VALUE: Any = object()


class Fields:
    """The metadata of one architecture; knows what has not been read yet.

    Attributes:
      architecture: what the file calls it ("qwen2").
    """

    def __init__(self, metadata: Mapping[str, Any], path: object):
        self._path = path
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: general.architecture is {architecture!r}; served as GGUF: "
                f"{', '.join(ARCHITECTURES)}: take the model as safetensors and use 'jblock convert hf'"
            )
        self.architecture: str = architecture
        prefix = f"{architecture}."
        self._values = {
            k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)
        }
        self._left = set(self._values)

    def integer(self, key: str, default: int | None = _NO_VALUE, least: int = 1) -> Any:
        """An integer from `least` on.

        Raises:
          CheckpointError: something else, or absent without a default.
        """
        value = self._value(key, default)
        if value is not default and (type(value) is not int or not least <= value < 2**31):
            raise self._wrong(key, value, f"an integer from {least} on")
        return value

    def number(self, key: str, default: float | None = _NO_VALUE) -> Any:
        """A finite number over 0. A float32 is read as the shortest decimal that stands for it, as
        config.json had it (9.999999747378752e-06 is 1e-05).

        Raises:
          CheckpointError: something else, or absent without a default.
        """
        value = self._value(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < 3.4e38:
            raise self._wrong(key, value, "a number over 0")
        return float(str(np.float32(value)))

    def raw(self, key: str, default: Any = None) -> Any:
        """Any value."""
        return self._value(key, default)

    def only(self, key: str, *allowed: Any) -> None:
        """Reads a key that must be absent or one of these values.

        Raises:
          CheckpointError: another value, which would change what is computed.
        """
        value = self._value(key, None)
        if value is not None and value not in allowed:
            raise self._wrong(key, value, " or ".join(map(repr, allowed)) or "no value")

    def finish(self) -> None:
        """Refuses what nobody has read.

        Raises:
          CheckpointError: a key is left.
        """
        if self._left:
            key = min(self._left)
            raise CheckpointError(
                f"{self._path}: {self.architecture}.{key} is {self._values[key]!r}, which is not known "
                "here: take the model as safetensors and use 'jblock convert hf'"
            )

    def _value(self, key: str, default: Any) -> Any:
        self._left.discard(key)
        value = self._values.get(key, default)
        if value is _NO_VALUE:
            raise CheckpointError(
                f"{self._path} has no {self.architecture}.{key}: convert the model to GGUF again"
            )
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {self.architecture}.{key} is {value!r}; only {expected} can be served: take "
            "the model as safetensors and use 'jblock convert hf'"
        )


def config(
    fields: Fields, vocab_size: int, names: frozenset[str], rope_factors: Any
) -> dict[str, Any]:
    """A config.json with the fields that transformers would write for the same model.

    Args:
      fields: the metadata; all of it is read.
      vocab_size: rows of the embedding.
      names: of all tensors in the file.
      rope_factors: the tensor rope_freqs.weight, by which each frequency is divided; None where there is
        none.

    Raises:
      CheckpointError: a value is missing, malformed, or changes what is computed.
    """
    architecture, model_type = ARCHITECTURES[fields.architecture]
    heads = fields.integer("attention.head_count")
    hidden = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", None)
    rotated = fields.integer("rope.dimension_count", None)
    head_dim = head_dim or rotated or hidden // heads
    if rotated not in (None, head_dim):
        raise CheckpointError(
            f"{fields.architecture}.rope.dimension_count is {rotated}, a head has {head_dim}: rope over part "
            "of a head is not known for this architecture"
        )
    fields.only("attention.value_length", head_dim)
    fields.only("attention.causal", True)
    fields.only("expert_count", 0)
    fields.only("expert_used_count", 0)
    fields.raw("vocab_size")  # llama.cpp goes by the rows of the embedding too
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": "float32",
    }
    out |= _rope(fields, out, rope_factors)
    out |= _OTHERS[fields.architecture](fields, out, names)
    fields.finish()
    return out


def _rope(fields: Fields, known: Mapping[str, Any], factors: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_theta": fields.number("rope.freq_base", 10000.0)}
    kind = fields.raw("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", None)
    original = fields.integer("rope.scaling.original_context_length", None)
    fast = fields.number("rope.scaling.yarn_beta_fast", None)
    slow = fields.number("rope.scaling.yarn_beta_slow", None)
    fields.only("rope.scaling.attn_factor", 1.0)
    fields.only("rope.scaling.yarn_attn_factor", 1.0)
    fields.only("rope.scaling.yarn_ext_factor", 1.0)
    fields.only("rope.scaling.yarn_log_multiplier")
    fields.raw("rope.scaling.finetuned")  # says how the model was trained, not what it computes
    scaling: dict[str, Any] = {}
    if kind == "linear" and factor:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor:
        given = {
            "original_max_position_embeddings": original,
            "beta_fast": fast,
            "beta_slow": slow,
        }
        scaling = {"rope_type": "yarn", "factor": factor}
        scaling |= {k: v for k, v in given.items() if v is not None}
    elif kind != "none" or factor not in (None, 1.0):
        raise CheckpointError(
            f"{fields.architecture}.rope.scaling.type is {kind!r} with factor {factor}; served: 'linear' and "
            "'yarn', with a factor"
        )
    if factors is not None:
        if scaling:
            raise CheckpointError(
                f"the file has rope_freqs.weight and {fields.architecture}.rope.scaling.type {kind!r}: which "
                "of the two is meant is not known"
            )
        scaling = _from_factors(np.asarray(factors, np.float64), {**known, **out})
    return out | ({"rope_scaling": scaling} if scaling else {})


def _from_factors(factors: np.ndarray, known: Mapping[str, Any]) -> dict[str, Any]:
    """The rope section whose frequencies are the usual ones, each divided by its factor.

    Files of Llama 3.1 and later have the factors instead of the rule they come from. It is put back where
    the rule with that model's numbers gives them; otherwise they are kept one by one.
    """
    half = known["head_dim"] // 2
    if factors.shape != (half,):
        raise CheckpointError(
            f"rope_freqs.weight has shape {list(factors.shape)}, expected [{half}]: convert the model to "
            "GGUF again"
        )
    if (factors == 1).all():
        return {}
    rule = _llama3_rule(factors, known["rope_theta"])
    if rule is not None:
        return rule
    each = [float(str(np.float32(f))) for f in factors]
    return {
        "rope_type": "longrope",
        "short_factor": each,
        "long_factor": each,
        "original_max_position_embeddings": known["max_position_embeddings"],
        "attention_factor": 1.0,
    }


def _llama3_rule(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The rule of Llama 3.1 (transformers: modeling_rope_utils.py) that gives these factors, if one does.

    Its two bounds are 1 and 4 in every model; its context length follows from a factor between the ends.
    """
    most, low, high = float(factors.max()), 1.0, 4.0
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    between = np.flatnonzero((factors > 1) & (factors < most))
    if not len(between):
        return None
    at = between[0]
    turns = low + (high - low) * (1 / factors[at] - 1 / most) / (1 - 1 / most)
    original = round(turns * wavelength[at])
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / most + smooth), rtol=1e-5, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": most,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _llama(fields: Fields, known: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    del known
    window = fields.integer("attention.sliding_window", None)
    mistral = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
    }
    return {
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in names,
        "mlp_bias": "blk.0.ffn_up.bias" in names,
        **(mistral if window else {}),
    }


def _qwen(fields: Fields, known: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    del fields, known, names
    return {"hidden_act": "silu", "use_sliding_window": False}


def _gemma(fields: Fields, known: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    del names
    layers, which = known["num_hidden_layers"], fields.architecture
    scalar = known["head_dim"]
    if layers == _GEMMA_27B[which]:
        scalar = known["hidden_size"] // known["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        **(_gemma2 if which == "gemma2" else _gemma3)(fields, known),
    }


def _gemma2(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
        "sliding_window": fields.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(fields, known["num_hidden_layers"], 2),
    }


def _gemma3(fields: Fields, known: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": fields.number("final_logit_softcapping", None),
        "sliding_window": fields.integer("attention.sliding_window"),
        "layer_types": _layer_types(fields, known["num_hidden_layers"], 6),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
    }


def _layer_types(fields: Fields, layers: int, period: int) -> list[str]:
    """The kind of each layer: every `period`-th is full, or as the file has it: another period, or a flag
    for each layer that slides."""
    given = fields.raw("attention.sliding_window_pattern", period)
    if isinstance(given, list):
        slides = [bool(flag) for flag in given]
    elif type(given) is int and given > 0:
        slides = [(i + 1) % given > 0 for i in range(layers)]
    else:
        slides = []
    if len(slides) != layers:
        raise CheckpointError(
            f"{fields.architecture}.attention.sliding_window_pattern is {given!r}: give a period or a flag "
            f"for each of the {layers} layers"
        )
    return ["sliding_attention" if s else "full_attention" for s in slides]


_OTHERS = {"llama": _llama, "qwen2": _qwen, "qwen3": _qwen, "gemma2": _gemma, "gemma3": _gemma}
