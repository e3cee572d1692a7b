"""The folder in which jblock keeps what only this user may have written: `$XDG_CACHE_HOME/jblock`.

A zoo may be shared; what would be trusted without a hash (training state, compiled programs, verified copies
of another place's components) must not lie in it.
"""

import os
import stat
from pathlib import Path


class UserCacheError(ValueError):
    """The user's own cache folder cannot be made, or others may write to it."""


def private_folder(*parts: str) -> Path:
    """Makes, if absent, a folder under the user's cache with permissions 0700, and returns it.

    Raises:
      UserCacheError: it cannot be made, belongs to another user, or others may write to it.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home, "jblock")
    try:
        # mkdir gives the mode to the last folder only; whoever may write to one above it could put
        # another in its place.
        for above in reversed(folder.parents):
            above.mkdir(mode=0o700, exist_ok=True)
        for part in ("", *parts):
            folder = folder / part
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.stat()
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                raise UserCacheError(
                    f"{folder} is owned or writable by others, who could plant files in it: chown it to "
                    "the user that runs this command and chmod it to 700, or set XDG_CACHE_HOME"
                )
    except OSError as e:
        raise UserCacheError(
            f"{folder} cannot be made ({e.strerror}): set XDG_CACHE_HOME to a folder that this user may "
            "write to"
        ) from e
    return folder
