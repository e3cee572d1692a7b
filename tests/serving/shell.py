"""`jblock-client` as a shell runs it, in this process: starting one takes seconds."""

import contextlib
import io
import os
import subprocess
from collections.abc import Mapping
from unittest import mock

from serving import client_main


def jblock_client(
    *words: str, stdin: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a command line prints, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, env or {}),
        mock.patch("sys.stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = client_main.main(client_main.parse(["jblock-client", *words]))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
