"""Checkpoints on the Hugging Face Hub: `org/name[@revision]`, downloaded to the cache of huggingface_hub.

What the library knows is left to it: its cache (HF_HOME), tokens (HF_TOKEN, `hf auth login`), offline mode
(HF_HUB_OFFLINE), other servers (HF_ENDPOINT), and downloads that go on where they broke off. Only files that
jblock reads are downloaded: no pickles, and no second copy of the weights in another layout.
"""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import tokenizer
from checkpoints.errors import CheckpointError
from checkpoints.progress import Progress

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
_WANTED = [
    "README.md",  # names the license
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter*.safetensors",
    "pytorch_model_head.safetensors",
    "head_config.json",
    *tokenizer.FILES,
    *tokenizer.OTHERS,  # so that a model with nothing else says what it has
]


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a source lies on this machine.

    Attributes:
      path: the folder or file.
      source: what was asked for: the path, or "org/name".
      revision: the commit that was downloaded; None for a path.
    """

    path: Path
    source: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Download:
    """What is still to be fetched of one source: a number of `files` with together `nbytes`."""

    files: int
    nbytes: int


def is_hub_name(text: str) -> bool:
    """Whether a source is a name on the Hub: of the form org/name[@revision], and nothing here is called so.

    What lies in a folder that exists is a path, though it does not: more likely it was mistyped.
    """
    if text.startswith((".", "/", "~")) or _is_here(text):
        return False
    return _NAME.fullmatch(text) is not None


def _is_here(text: str) -> bool:
    first = Path(Path(text).parts[0])
    return Path(text).exists() or first.is_dir()


def locate(text: str, progress: Progress) -> Located:
    """The folder or file a source is in; downloads it where it is a name on the Hub.

    Args:
      text: a path, org/name, or org/name/FILE; of the last two also with @revision (a branch, tag or
        commit).
      progress: told of a download.

    Raises:
      CheckpointError: the Hub refuses, cannot be reached, or the disk is full; says what to do.
    """
    if not is_hub_name(text):
        return Located(path=Path(text), source=text)
    repo, file, revision = _parts(text)
    with _errors(repo, revision):
        todo = _todo(repo, file, revision)
        if todo is None or not todo.nbytes:
            path = _fetch(repo, file, revision, None)
        else:
            with progress.bar(f"{repo}: downloading", todo.nbytes) as advance:
                path = _fetch(repo, file, revision, advance)
    # <cache>/models--org--name/snapshots/<commit>, and for one file its name below.
    parts = path.parts
    commit = parts[len(parts) - parts[::-1].index("snapshots")]
    progress.note(f"{repo}: commit {commit}")
    return Located(path=path, source=f"{repo}/{file}" if file else repo, revision=commit)


def to_download(text: str) -> Download:
    """What `locate` would download now: nothing of a path, and of what the cache has.

    Raises:
      CheckpointError: as `locate`.
    """
    if not is_hub_name(text):
        return Download(files=0, nbytes=0)
    repo, file, revision = _parts(text)
    with _errors(repo, revision):
        found = _todo(repo, file, revision)
    return found or Download(files=0, nbytes=0)


def _parts(text: str) -> tuple[str, str | None, str | None]:
    match = _NAME.fullmatch(text)
    assert match is not None
    return match["repo"], match["file"], match["revision"]


def _todo(repo: str, file: str | None, revision: str | None) -> Download | None:
    """What is to be fetched; None where only the cache can be asked."""
    from huggingface_hub.errors import DryRunError, LocalEntryNotFoundError

    try:
        infos = _call(repo, file, revision, dry_run=True, tqdm_class=_quiet_bar(_nothing))
    except (DryRunError, LocalEntryNotFoundError):
        return None
    missing = [i for i in infos if i.will_download]
    return Download(files=len(missing), nbytes=sum(i.file_size or 0 for i in missing))


def _fetch(
    repo: str, file: str | None, revision: str | None, advance: Callable[[int], None] | None
) -> Path:
    return Path(_call(repo, file, revision, tqdm_class=_quiet_bar(advance or _nothing)))


def _nothing(nbytes: int) -> None:
    del nbytes


def _call(repo: str, file: str | None, revision: str | None, **options: Any) -> Any:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what comes of its warnings is told in one line
    try:
        if file is None:
            return snapshot_download(repo, revision=revision, allow_patterns=_WANTED, **options)
        found = hf_hub_download(repo, file, revision=revision, **options)
        return [found] if options.get("dry_run") else found
    finally:
        logging.set_verbosity(verbosity)


def _quiet_bar(advance: Callable[[int], None]) -> Any:
    """A bar for huggingface_hub that draws nothing and tells of bytes.

    The library has several bars of bytes for one download (received, written): the one that is furthest
    counts.
    """
    from tqdm.auto import tqdm

    counts: dict[int, float] = {}
    told = 0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            options.pop("name", None)
            self.of_bytes = options.get("unit") == "B"
            super().__init__(*args, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            if self.of_bytes:
                counts[id(self)] = counts.get(id(self), 0) + (n or 0)
                most = int(max(counts.values()))
                if most > told:
                    advance(most - told)
                    told = most

    return Bar


class _errors:
    """Says what went wrong with the Hub, and what to do."""

    def __init__(self, repo: str, revision: str | None):
        self.repo = repo
        self.revision = revision or "main"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return
        said = self._explain(error)
        if said is not None:
            raise CheckpointError(f"{self.repo}: {said}") from error

    def _explain(self, error: Exception) -> str | None:
        from huggingface_hub import constants, errors

        if isinstance(error.__cause__, errors.HfHubHTTPError):
            error = error.__cause__  # "not in the cache" follows from it
        offline = constants.HF_HUB_OFFLINE
        status = getattr(getattr(error, "response", None), "status_code", None)
        page = f"{constants.ENDPOINT}/{self.repo}"
        match error:
            case errors.GatedRepoError():
                return (
                    f"the model is gated (status {status}): ask for access at {page}, then log in with "
                    "'hf auth login' or set HF_TOKEN"
                )
            case errors.RevisionNotFoundError():
                return (
                    f"it has no revision {self.revision!r}: give a branch, tag or commit of {page}"
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"the Hub has no such model, or it is private (status {status}): check the name; for a "
                    "private model log in with 'hf auth login' or set HF_TOKEN"
                )
            case errors.RemoteEntryNotFoundError():
                return f"it has no such file in revision {self.revision!r}: see {page}/tree/{self.revision}"
            case errors.HFValidationError():
                return (
                    f"no name on the Hub ({error}): give org/name[@revision], or a path that exists"
                )
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() if offline:
                return (
                    f"revision {self.revision!r} is not in the cache ({constants.HF_HUB_CACHE}), and "
                    "HF_HUB_OFFLINE forbids downloads: unset it, or download the model first"
                )
            case errors.HfHubHTTPError():
                if status in (401, 403):
                    return (
                        f"access is refused (status {status}): log in with 'hf auth login' or set HF_TOKEN "
                        f"to a token that may read {page}"
                    )
                return f"the Hub answers with an error ({_first_line(error)}): try again later"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"the disk with the cache is full ({constants.HF_HUB_CACHE}): free some space or set HF_HOME "
                "to a folder on another disk; the same command then downloads only what is missing"
            )
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.HTTPError, OSError)):
            return (
                f"cannot be downloaded ({_first_line(error)}): check the network; the same command again "
                "downloads only what is missing"
            )
        return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0].removesuffix(os.linesep)
