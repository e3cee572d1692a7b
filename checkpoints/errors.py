"""What the converter refuses."""

from jblock.blocks.spec import SpecError
from jblock.families import ConfigError
from jblock.zoo.records import ZooError


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted: names the field, the value and the remedy."""


# Everything that means "bad input": one line on stderr and exit code 2, never a traceback.
BAD_INPUT = (CheckpointError, ConfigError, SpecError, ZooError)
