"""Converters in processes of their own, forked from one that has imported everything once."""

import contextlib
import io
import multiprocessing
import resource

from checkpoints import main
from jblock.zoo import writer

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["checkpoints.hf", "checkpoints.peft", "orbax.checkpoint", "tokenizers", "child_runs"]
)


def start(*argv, file_limit=None, part=None):
    """Starts `jblock-convert *argv`; returns the process and the pipe its result comes through.

    Args:
      argv: the command line.
      file_limit: longest file the process may write, in bytes: a disk that is full for it.
      part: staged bytes at which a converter moves them in; None: as many as usual.
    """
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_run, args=(send, [str(a) for a in argv], file_limit, part))
    process.start()
    send.close()
    return process, receive


def run(*argv, file_limit=None):
    """Runs a command to its end; returns exit code and stderr."""
    process, receive = start(*argv, file_limit=file_limit)
    code, err = receive.recv()
    process.join()
    return code, err


def grown_bytes(first, second):
    """By how much the peak memory of a process grows when it runs `second` after `first`."""
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_measure, args=(send, first, second))
    process.start()
    send.close()
    before, after = receive.recv()
    process.join()
    return (after - before) * 1024


def _measure(send, *commands):
    peaks = []
    for argv in commands:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            code = main.main(main.parse(["jblock-convert", *map(str, argv)]))
        if code:
            raise SystemExit(f"{argv} exited with {code}")
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    send.send(tuple(peaks))


def _run(send, argv, file_limit, part):
    if part is not None:
        writer.PART_BYTES = part
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main.main(main.parse(["jblock-convert", *argv]))
    send.send((code, err.getvalue()))
