"""What a chain has to be: its steps in order, of kinds and widths that meet, and a policy that its content
allows. Nothing of this is taken on trust from the record."""

from collections.abc import Sequence

from jblock.blocks.compressed_spec import BitDeltaSpec, LowRankSpec
from jblock.blocks.delta_spec import DeltaSpec
from jblock.blocks.spec import LAYER_KINDS, ComponentSpec, EmbeddingSpec, StitchSpec
from jblock.zoo.records import POLICIES, Chain, DamagedError, NewerError

PACKED = ("gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes")
"""`quant_method` of the published checkpoints whose packed weights are taken as they are."""

# Command that made a chain of another one -> the least policy it can have.
_COMMANDS = {
    "compress": "near",
    "quantise": "near",
    "quantize": "near",
    "equivalence": "near",
    "stitch": "adaptive",
    "surrogate": "adaptive",
}


def check_steps(
    chain: Chain, specs: Sequence[ComponentSpec], deltas: Sequence[Sequence[DeltaSpec]]
) -> None:
    """Checks order, kinds and widths of a chain's steps, its family and its policy.

    Args:
      chain: the record.
      specs: of the component of each step.
      deltas: of each step.

    Raises:
      DamagedError: they do not fit each other; the message names the step.
      NewerError: a family that this version does not know.
    """
    what = f"model {chain.name}"
    kinds = [spec.kind for spec in specs]
    if len(kinds) < 3 or [kinds[0], *kinds[-2:]] != ["embedding", "norm", "unembedding"]:
        raise DamagedError(
            f"{what} has the steps {', '.join(kinds) or 'none'}, expected an embedding, layers, a norm and "
            "an unembedding"
        )
    width = 0
    for index, spec in enumerate(specs):
        inside = 0 < index < len(specs) - 2
        if inside and spec.kind not in (*LAYER_KINDS, StitchSpec.kind):
            raise DamagedError(f"{what}: step {index} is a {spec.kind}, expected a layer")
        if not inside and spec.kind in (*LAYER_KINDS, StitchSpec.kind):
            raise DamagedError(
                f"{what}: step {index} is a {spec.kind}, which stands between layers"
            )
        if width and spec.hidden_size != width:
            raise DamagedError(
                f"{what}: step {index} ({spec.kind}) reads rows of {spec.hidden_size}, the step before "
                f"gives {width}"
            )
        if spec.kind == "expert" and kinds[index - 1] not in ("router", "expert"):
            raise DamagedError(f"{what}: step {index} is an expert without a router before it")
        width = spec.output_size if isinstance(spec, StitchSpec) else spec.hidden_size
    embedding = specs[0]
    if isinstance(embedding, EmbeddingSpec) and embedding.vocab_size != chain.vocab_size:
        raise DamagedError(
            f"{what} has vocab_size {chain.vocab_size}, its embedding {embedding.vocab_size}"
        )
    acting = {getattr(delta, "invocation", ()) for each in deltas for delta in each}
    if acting and acting != {chain.invocation}:
        raise DamagedError(
            f"{what} is invoked by {list(chain.invocation) or 'nothing'}, its deltas by "
            f"{sorted(list(a) for a in acting)}: an activated LoRA stands alone on components of its base"
        )
    least = content_policy(chain, specs, deltas)
    if POLICIES.index(chain.policy) < POLICIES.index(least):
        raise DamagedError(
            f"{what} says policy {chain.policy}, its content makes it {least}: it was edited; make "
            "it again"
        )
    from jblock.families import families  # of another room, and needed only here

    if chain.family not in families():
        raise NewerError(
            f"{what} is of family {chain.family!r}; known: {', '.join(sorted(families()))}: use the "
            "version of jblock that made it"
        )


def content_policy(
    chain: Chain, specs: Sequence[ComponentSpec], deltas: Sequence[Sequence[DeltaSpec]]
) -> str:
    """The least policy a chain can have: by its components, its deltas and the command that made it."""
    found = ["exact"]
    if any(isinstance(spec, StitchSpec) for spec in specs):
        found.append("adaptive")
    # Weights that came packed from their maker are that model's own, and exact: no files of theirs are kept,
    # and no model of a zoo was the original.
    own_files = chain.base is None and chain.source_files is not None
    packed = chain.derived.keys() == {"packed"} and not own_files
    method = chain.derived["packed"].get("quant_method") if packed else None
    if method not in PACKED and any(getattr(spec, "quant", None) is not None for spec in specs):
        found.append("near")
    if any(isinstance(d, (LowRankSpec, BitDeltaSpec)) for each in deltas for d in each):
        found.append("near")
    command = chain.derived.get("command")
    if command is not None:
        found.append(_COMMANDS.get(command, "near") if isinstance(command, str) else "adaptive")
    elif "chain" in chain.derived:
        found.append("near")
    return max(found, key=POLICIES.index)
