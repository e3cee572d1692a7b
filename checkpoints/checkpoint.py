"""A checkpoint opened for the zoo: its config understood, its tensors named, counted and checked.

Every source ends here (`opening.py` has the ways to it), so that all commands take and refuse the same ones.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints import layouts, naming, prequantized
from checkpoints.errors import CheckpointError
from checkpoints.folders import expect_checkpoint
from checkpoints.generation import ignored
from checkpoints.multimodal import text_model
from checkpoints.safetensors_file import TensorInfo
from checkpoints.source import Source, open_source, read_json
from checkpoints.tokenizer import TokenizerFiles, read_tokenizer
from jblock.families import Family, Plan, family_for
from jblock.families.fields import Fields
from jblock.families.multimodal import text_config, wrapper_of
from jblock.zoo.ids import FLOATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be added.

    Attributes:
      path: its folder.
      config: config.json as it is; of a multimodal checkpoint that of its text model.
      described: config.json without what says how weights are packed.
      generation: generation_config.json; {} when there is none.
      family: its architecture.
      plan: its components, under the names that its files have.
      source: its tensors.
      buffers: names of tensors that no model needs, which only an export writes again.
      notes: what its user should know: what was left out or ignored.
      tokenizer: its tokenizer files; None when it has none.
      license: its license, where the source itself says.
    """

    path: Path
    config: dict[str, Any]
    described: dict[str, Any]
    generation: dict[str, Any]
    family: Family
    plan: Plan
    source: Source
    buffers: tuple[str, ...]
    notes: tuple[str, ...]
    tokenizer: TokenizerFiles | None
    license: str | None = None

    @property
    def packed(self) -> dict[str, Any] | None:
        """What config.json says of packed weights; None where they are plain."""
        return self.config.get(prequantized.FIELD) or None


def open_folder(path: Path) -> Checkpoint:
    """Reads all of a folder in Hugging Face form but its tensors' numbers.

    Raises:
      CheckpointError, ConfigError, SpecError: see `errors.BAD_INPUT`.
    """
    expect_checkpoint(path)
    config = read_json(path / "config.json")
    generation = read_json(path / "generation_config.json", required=False)
    config, source = text_model(config, open_source(path))
    tokenizer = read_tokenizer(path)
    return understood(path, config, generation, source, tokenizer, read_license(path))


def read_license(path: Path) -> str | None:
    """The license that the model card of a folder (README.md) names in its header, if it does."""
    try:
        with open(path / "README.md", encoding="utf-8", errors="replace") as card:
            header = re.match(r"---\n(.*?)\n---", card.read(1 << 16), re.S)
    except OSError:
        return None
    found = header and re.search(r"^license: *['\"]?([\w.+-]{1,64})", header[1], re.M)
    return found[1] if found else None


def understood(
    path: Path,
    config: dict[str, Any],
    generation: dict[str, Any],
    source: Source,
    tokenizer: TokenizerFiles | None,
    license: str | None = None,
) -> Checkpoint:
    """The checkpoint of this config, these tensors and tokenizer files: planned, and checked.

    Raises:
      CheckpointError, ConfigError, SpecError: see `errors.BAD_INPUT`.
    """
    family = family_for(config)
    described = {n: v for n, v in config.items() if n != prequantized.FIELD}
    # Of a multimodal wrapper the text model's fields are followed up; the rest is the vision part's.
    wrapper = wrapper_of(described)
    fields = Fields(described if wrapper is None else text_config(described, wrapper))
    plan = family.plan(fields)
    plan, source = layouts.fit(plan if wrapper is None else family.plan(described), source)
    if config.get(prequantized.FIELD):
        _check_packing_is_meant(config[prequantized.FIELD], source)
        packing = prequantized.packing_of(config)
        plan, source = prequantized.unpacked(plan, source, packing)
    buffers = check_tensors(plan, source)
    notes = [*source.notes, *_notes_on_config(config, family, fields.unread())]
    unused = ignored(generation)
    if unused:
        notes.append(
            f"generation_config.json: {len(unused)} fields are ignored, requests say how they generate: "
            + ", ".join(unused)
        )
    if buffers:
        notes.append(
            f"{len(buffers)} buffers (masks, rope tables) are left out, which the config decides: "
            + shortened(buffers, 2)
        )
    return Checkpoint(
        path=path,
        config=config,
        described=described,
        generation=generation,
        family=family,
        plan=plan,
        source=source,
        buffers=buffers,
        notes=tuple(notes),
        tokenizer=tokenizer,
        license=license,
    )


def _notes_on_config(config: Mapping[str, Any], family: Family, unread: Sequence[str]) -> list[str]:
    """What of a config decides nothing here."""
    notes = []
    if unread:
        notes.append(
            f"config.json: {len(unread)} fields are ignored, which decide nothing here ({family.name}): "
            + ", ".join(unread)
        )
    kind = config.get("model_type")
    wrapped = wrapper_of(config) is not None
    if config.get("architectures") and kind not in (None, *family.model_types) and not wrapped:
        notes.append(
            f"config.json: model_type is {kind!r}; architectures is followed ({config['architectures'][0]})"
        )
    return notes


def check_tensors(plan: Plan, source: Source) -> tuple[str, ...]:
    """Checks that a checkpoint holds what its config promises, and nothing else that a model could need.

    Returns:
      Names of the buffers that it holds beside, sorted.

    Raises:
      CheckpointError: a tensor is missing, surplus, empty, or of another shape or dtype; or a copy that
        differs.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for step in plan.steps:
        shapes = step.spec.tensors()
        wanted |= {source_name: shapes[name] for name, source_name in step.tensors.items()}
    left = source.tensors.keys() - wanted.keys() - plan.copies.keys()
    buffers = tuple(sorted(n for n in left if plan.is_buffer(n)))
    surplus = sorted(left - set(buffers))
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        raise CheckpointError(
            f"{source.path}: {len(missing)} tensors are missing: {shortened(missing)}: "
            + (naming.explain(surplus, missing) or _GIVE_ALL)
        )
    for name, shape in wanted.items():
        _check_tensor(source, source.tensors[name], shape)
    for name in sorted(plan.copies.keys() & source.tensors.keys()):
        if not source.equal(name, plan.copies[name]):
            raise CheckpointError(
                f"{source.path}: config.json ties {name!r} to {plan.copies[name]!r}, but the "
                "two differ: set tie_word_embeddings to false if both are meant"
            )
    if surplus:
        raise CheckpointError(
            f"{source.path}: {len(surplus)} tensors are surplus: {shortened(surplus)}: "
            + _why_surplus(surplus)
        )
    return buffers


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The first of some names, quoted."""
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


_GIVE_ALL = "give the whole checkpoint, and the config.json that belongs to it"


def _check_tensor(source: Source, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        if 0 in info.shape:
            raise CheckpointError(
                f"{source.path}: tensor {info.name!r} is empty (shape {list(info.shape)}), as DeepSpeed "
                "ZeRO-3 leaves partitioned parameters: gather them when saving (stage3_gather_16bit_"
                "weights_on_model_save, or zero_to_fp32.py in the checkpoint's folder)"
            )
        raise CheckpointError(
            f"{source.path}: tensor {info.name!r} has shape {list(info.shape)}, config.json makes it "
            f"{list(shape)}: one of the two is of another model"
        )
    if info.dtype.name not in FLOATS and info.name not in source.made:
        raise CheckpointError(
            f"{source.path}: tensor {info.name!r} is {info.dtype.name}; weights are served in "
            f"{', '.join(FLOATS)}: "
            + (
                "save it as one of these (transformers: model.to(torch.bfloat16).save_pretrained(folder))"
                if info.dtype.name == "float64"
                else "such numbers stand for packed weights, and config.json does not say how: take the "
                "unquantized checkpoint, or the config.json that belongs to this one"
            )
        )


def _why_surplus(surplus: Sequence[str]) -> str:
    if any(".lora_" in n or ".base_layer." in n for n in surplus):
        return (
            "an adapter was saved within the model: call PEFT's merge_and_unload() and save the result, "
            "or save the adapter alone and add it with 'peft'"
        )
    return "config.json describes a model without them, so what they are for is not known"


def _check_packing_is_meant(section: Any, source: Source) -> None:
    """A merge of a QLoRA adapter leaves the section of bitsandbytes over plain float weights.

    Raises:
      CheckpointError: that is so here.
    """
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    loads = isinstance(section, Mapping) and any(
        k.startswith(("load_in_", "_load_in_")) for k in section
    )
    if method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit") and not loads:
        return
    packed = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".absmax", ".SCB")
    if not any(n.endswith(packed) for n in source.tensors):
        raise CheckpointError(
            f"{source.path}: config.json has a {prequantized.FIELD} of bitsandbytes, but the weights are "
            "plain floats, as after merging a QLoRA adapter: remove the section from config.json to serve "
            "them as they are, or use 'jblock convert quantize' afterwards for few bits"
        )
