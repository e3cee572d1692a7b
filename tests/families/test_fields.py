"""No field of a config is passed over in silence: it is read, it is bookkeeping, or it is named.

data/config_fields.json has the names of the fields that the config classes of transformers 5.24.0 declare, by
model_type.
"""

import json
from pathlib import Path

import pytest
from test_families import BASE, LLAMA3

from jblock.blocks.rope_spec import RopeSpec
from jblock.families import ConfigError, family_for
from jblock.families.fields import Fields, changed

KNOWN = json.loads((Path(__file__).parent / "data" / "config_fields.json").read_text())
LLAMA = BASE | {"architectures": ["LlamaForCausalLM"]}
PHI3 = BASE | {"architectures": ["Phi3ForCausalLM"]}
# What some families want beside the usual fields.
NEEDS = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}}
# Fields that decide nothing where another one is as in these configs.
CONDITIONAL = {
    "qwen2": {"max_window_layers", "sliding_window"},
    "qwen3": {"max_window_layers", "sliding_window"},
    "smollm3": {"no_rope_layer_interval", "max_window_layers", "sliding_window"},
    "phi3": {"original_max_position_embeddings"},
}


def read(config):
    """The plan of a config, and its fields with what was read of them."""
    fields = Fields(config)
    return family_for(config).plan(fields), fields


def rope(config):
    """The rotary embedding of the first layer, and which fields were ignored."""
    plan, fields = read(config)
    return plan.steps[1].spec.rope, fields.unread()


def planned(kind):
    """A config of this type that can be planned; None where it takes more than the usual fields."""
    usual = {k: v for k, v in BASE.items() if k != "architectures"}
    config = {**usual, "model_type": kind, **NEEDS.get(kind, {})}
    try:
        read(config)
    except ValueError:
        return None
    return config


PLANNED = {k: planned(k) for k in sorted(KNOWN)}


def test_most_families_are_planned_here():
    assert sum(config is not None for config in PLANNED.values()) >= len(PLANNED) * 2 // 3


@pytest.mark.parametrize("kind", [k for k, config in PLANNED.items() if config])
def test_every_field_of_an_architecture_is_known(kind):
    """A field that the architecture has is read or bookkeeping; one that it does not have is named."""
    config = PLANNED[kind] | {"a_new_option": 1}
    fields = read(config)[1]
    assert "a_new_option" in fields.unread()
    # Fields that were asked for count as read, there or not.
    asked = fields.asked() | CONDITIONAL.get(kind, set())
    probe = Fields({name: 0 for name in KNOWN[kind] if name not in asked})
    assert probe.unread() == []


def test_a_changed_copy_shares_its_record():
    fields = Fields({"a": 1, "b": {"c": 2, "d": 3}, "e": None, "f": 4, "use_cache": True})
    copy = changed(fields, f=5)
    assert (copy["a"], copy["f"], copy["b"]["c"]) == (1, 5, 2)
    assert fields.unread() == ["b.d"]
    assert changed({"a": 1}, a=2) == {"a": 2}


# Rope: both sections are read like the config itself.


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("fields", "spec"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, RopeSpec(theta=5e5)),
        (
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            RopeSpec(kind="linear", factor=2.0, theta=5e5),
        ),
        (
            {"type": "linear", "rope_type": "linear", "factor": 2.0},
            RopeSpec(kind="linear", factor=2.0),
        ),
    ],
)
def test_theta_stands_in_either_section(section, fields, spec):
    assert rope(LLAMA | {section: fields}) == (spec, [])


@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_the_rotated_share_stands_in_either_section(section, kind):
    share = {"partial_rotary_factor": 0.5}
    inside, ignored = rope(PHI3 | {section: kind | share})
    assert inside.dim > 0 and ignored == []
    assert rope(PHI3 | share | {section: kind})[0] == inside


@pytest.mark.parametrize(
    ("section", "ignored"),
    [
        ({"rope_type": "default", "factor": 2.0}, {"factor"}),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, {"beta_fast"}),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8}, {"attn_factor"}),
        ({"rope_type": "yarn", "factor": 4.0, "finetuned": True}, {"finetuned"}),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1}, {"alpha"}),
        ({"rope_type": "llama3", **LLAMA3, "mscale": 1.0}, {"mscale"}),
    ],
)
def test_rope_fields_that_a_variant_does_not_have_are_named(section, ignored):
    spec, found = rope(LLAMA | {"rope_scaling": section})
    assert {f"rope_scaling.{name}" for name in ignored} == set(found)
    plain = {k: v for k, v in section.items() if k not in ignored}
    assert spec == rope(LLAMA | {"rope_scaling": plain})[0]


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 1e4}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope_theta": 5e5}),
    ],
)
def test_sections_that_disagree_are_refused(scaling, parameters):
    both = {"rope_scaling": scaling, "rope_parameters": parameters}
    with pytest.raises(ConfigError, match=r"rope_scaling describes .* rope_parameters"):
        rope(LLAMA | both)


def test_sections_that_agree_are_one():
    both = {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "rope_theta": 5e5,
    }
    assert rope(LLAMA | both) == (RopeSpec(kind="linear", factor=2.0, theta=5e5), [])


def test_native_architectures_come_before_code_of_the_checkpoint():
    code = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.Phi3ForCausalLM"}
    assert "auto_map" in read(PHI3 | {"auto_map": code})[1].unread()
    with pytest.raises(ConfigError, match="never run"):
        family_for(PHI3 | {"architectures": ["OwnForCausalLM"], "auto_map": code})
