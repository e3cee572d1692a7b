"""Which fields of a config were read, so that the rest can be named: nothing is passed over in silence."""

from collections.abc import Mapping
from typing import Any

# Fields that decide nothing of what a model computes: how it was trained, saved, or asked elsewhere.
_BOOKKEEPING = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path"),
        *("torch_dtype", "dtype", "use_cache", "cache_implementation", "_attn_implementation"),
        *("attn_implementation", "_attn_implementation_autoset", "initializer_range"),
        *("initializer_factor", "attention_dropout", "hidden_dropout", "classifier_dropout"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "residual_dropout", "embedding_dropout"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *(
            "return_dict_in_generate",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "router_z_loss_coef",
        ),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "torchscript"),
        *("is_encoder_decoder", "is_decoder", "chunk_size_feed_forward", "task_specific_params"),
        *("pretraining_tp", "gradient_checkpointing", "use_bfloat16", "tokenizer_class", "prefix"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout", "reorder_and_upcast_attn", "n_ctx", "pruned_heads"),
        *("unsloth_version", "unsloth_fixed", "_commit_hash"),
    }
)


class Fields(dict[str, Any]):
    """A config, or a table in one, that keeps in mind which of its fields were read.

    Tables within are of this class too. A copy of it shares their records, but not its own: `changed` gives
    one that does.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__({k: Fields(v) if type(v) is dict else v for k, v in config.items()})
        self._read: set[str] = set()

    def __getitem__(self, field: str) -> Any:
        self._read.add(field)
        return super().__getitem__(field)

    def get(self, field: str, default: Any = None) -> Any:
        self._read.add(field)
        return super().get(field, default)

    def asked(self) -> frozenset[str]:
        """Fields that were asked for, there or not."""
        return frozenset(self._read)

    def unread(self, prefix: str = "") -> list[str]:
        """Paths of the fields that hold something and were not read, sorted; without bookkeeping."""
        out = []
        for field, value in self.items():
            if value is None or (not prefix and field in _BOOKKEEPING):
                continue
            if field not in self._read:
                out.append(prefix + field)
            elif isinstance(value, Fields):
                out += value.unread(f"{prefix}{field}.")
        return sorted(out)


def changed(config: Mapping[str, Any], **changes: Any) -> Mapping[str, Any]:
    """The config with some fields replaced. What is read of the others counts as read of the config."""
    if not isinstance(config, Fields):
        return {**config, **changes}
    out = Fields({})
    dict.update(out, config)
    dict.update(out, changes)
    out._read = config._read
    return out
