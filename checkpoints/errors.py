"""What the converter refuses."""

import contextlib
from collections.abc import Iterator

from jblock.blocks.spec import SpecError
from jblock.families import ConfigError
from jblock.zoo.records import ZooError


class CheckpointError(ValueError):
    """A checkpoint that cannot be converted: names the field, the value and the remedy."""


# Everything that means "bad input": one line on stderr and exit code 2, never a traceback.
BAD_INPUT = (CheckpointError, ConfigError, SpecError, ZooError)


@contextlib.contextmanager
def fitting(what: str) -> Iterator[None]:
    """Work with a model's record and the files kept with it, which in a zoo from elsewhere may be any.

    Raises:
      CheckpointError: they do not fit each other.
    """
    try:
        yield
    except BAD_INPUT:
        raise
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as e:
        raise CheckpointError(
            f"{what} is not what it was made from: its record and the files kept with it do not fit "
            f"({type(e).__name__}: {e})"
        ) from e
