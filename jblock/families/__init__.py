"""Architectures: what a checkpoint's config means, one declarative file each.

Every module of this package that has a `FAMILY` is one; adding a file adds an architecture.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from jblock.families.base import Family, Plan, PlannedStep
from jblock.families.config import ConfigError
from jblock.families.multimodal import text_config, wrapper_of
from jblock.families.unserved import why_unserved

__all__ = ["ConfigError", "Family", "Plan", "PlannedStep", "families", "family_for"]


@functools.cache
def families() -> dict[str, Family]:
    """Every family by name."""
    found = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        family = getattr(importlib.import_module(f"{__name__}.{module}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found


def family_for(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, by `architectures[0]`, or by `model_type` where that is absent.

    A multimodal architecture has the family of its text model.

    Raises:
      ConfigError: an architecture that is not known or not served yet, or that comes with code of its
        own and is none of these.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) > 1 or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"config.json: architectures is {names!r}; give a list of one name")
    wrapper = wrapper_of(config)
    if wrapper is not None:
        return family_for(text_config(config, wrapper))
    for family in families().values():
        if names and names[0] in family.architectures:
            return family
        if not names and config.get("model_type") in family.model_types:
            return family
    known = sorted(a for f in families().values() for a in f.architectures)
    reason = why_unserved(config)
    if reason is not None:
        raise ConfigError(f"config.json: {reason}; served: {', '.join(known)}")
    if isinstance(config.get("auto_map"), dict) and "AutoModelForCausalLM" in config["auto_map"]:
        raise ConfigError(
            "config.json: auto_map names code that comes with the checkpoint, which is never run, and "
            f"architectures is {names!r}; architectures served: {', '.join(known)}"
        )
    given = f"architecture {names[0]!r}" if names else f"model_type {config.get('model_type')!r}"
    raise ConfigError(f"config.json: {given} is not served; served: {', '.join(known)}")
