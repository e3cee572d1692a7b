"""Where stitches stand in a chain: what their place decides, and that widths meet there."""

from collections.abc import Sequence

from jblock.blocks.spec import AttentionSpec, ComponentSpec, StitchSpec
from jblock.zoo.partition import Block


def positions(specs: Sequence[ComponentSpec], block: Block) -> tuple[int, ...]:
    """For each stitch of a block, its position for the attention layers below it.

    Args:
      specs: of the whole chain.
      block: of that chain.

    Raises:
      SpecError: a stitch was not trained for so many.
    """
    return tuple(
        spec.position(sum(isinstance(s, AttentionSpec) for s in specs[:at]))
        for at, spec in enumerate(specs)
        if isinstance(spec, StitchSpec) and 0 <= at - block.first < len(block.components)
    )


def check_widths(name: str, specs: Sequence[ComponentSpec]) -> None:
    """Every component must read what the one before it wrote.

    Args:
      name: of the model, for the message.
      specs: of its chain.

    Raises:
      ValueError: one does not.
    """
    width = None
    for at, spec in enumerate(specs):
        if width not in (None, spec.hidden_size):
            raise ValueError(
                f"model {name!r}: step {at} reads hidden size {spec.hidden_size}, the step before "
                f"it writes {width}: a stitch has to stand between them"
            )
        width = spec.output_size if isinstance(spec, StitchSpec) else spec.hidden_size
