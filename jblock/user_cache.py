"""Folders that only this user may write to, and the one in which jblock keeps what it trusts without a hash:
`$XDG_CACHE_HOME/jblock`.

A zoo may be shared; what would be trusted without a hash (training state, compiled programs, verified copies
of another place's components) must not lie in it.
"""

import os
import stat
from pathlib import Path


class UserCacheError(ValueError):
    """A folder of this user's own cannot be made, or others may write to it."""


def cache_folder(*parts: str) -> Path:
    """The path of a folder under the user's cache, there or not."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home, "jblock", *parts)


def private_folder(*parts: str) -> Path:
    """Makes, if absent, a folder under the user's cache, and returns it; see `make_private`."""
    folder = make_private(cache_folder())
    for part in parts:
        folder = make_private(folder / part)
    return folder


def make_private(folder: Path) -> Path:
    """Makes, if absent, a folder with permissions 0700, and returns it.

    Raises:
      UserCacheError: it cannot be made, belongs to another user, or others may write to it.
    """
    try:
        # mkdir gives the mode to the last folder only; whoever may write to one above it could put
        # another in its place.
        for above in reversed(folder.parents):
            above.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as e:
        raise UserCacheError(
            f"{folder} cannot be made ({e.strerror}): set XDG_CACHE_HOME to a folder that this user may "
            "write to"
        ) from e
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        raise UserCacheError(
            f"{folder} is owned or writable by others, who could plant files in it: chown it to "
            "the user that runs this command and chmod it to 700, or set XDG_CACHE_HOME"
        )
    return folder
