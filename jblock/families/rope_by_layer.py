"""Rotary embeddings of models whose sliding layers have another one than the rest (Gemma 3, OLMo 3)."""

import dataclasses

from jblock.families import config as cfg
from jblock.families.base import Config
from jblock.families.fields import changed
from jblock.families.rope import RopeSpec, rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRope:
    """The rotary embedding of one type of layers.

    Attributes:
      theta: what a config without the field means.
      theta_field: where the older spelling has it.
      scaled: `rope_scaling` of the older spelling applies to it.
    """

    theta: float
    theta_field: str = "rope_theta"
    scaled: bool = False


def rope_of_layer(
    config: Config, head_dim: int, *, slides: bool, full: LayerRope, sliding: LayerRope
) -> RopeSpec:
    """The rotary embedding of a layer.

    transformers 5 nests the fields of each type of layers in `rope_parameters`; older configs have them
    outside.

    Raises:
      ConfigError: as `rope`; or `rope_parameters` has other sections than these.
    """
    known = {"full_attention": full, "sliding_attention": sliding}
    kind = "sliding_attention" if slides else "full_attention"
    mine = known[kind]
    inner = config
    sections = config.get("rope_parameters")
    if sections is not None:
        if not isinstance(sections, dict) or not sections.keys() <= known.keys():
            raise cfg.ConfigError(
                f"config.json: rope_parameters is {sections!r}; give a set of fields for each of "
                f"{', '.join(map(repr, known))}"
            )
        # The older fields outside say the same, or nothing.
        inner = changed(inner, rope_parameters=sections.get(kind) or {})
    if not mine.scaled:
        inner = changed(inner, rope_scaling=None)
    return rope(inner, head_dim, theta=mine.theta, theta_field=mine.theta_field)
