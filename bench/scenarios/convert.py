"""Converting a large checkpoint: speed over copying and hashing, memory, and what a killed try repeats."""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.models import TINY, ModelShape
from bench.report import median, progress
from checkpoints.source import open_source
from jblock.zoo.codec import read_json
from jblock.zoo.fsck import fsck
from jblock.zoo.journal import FOLDER
from jblock.zoo.store import Zoo

_ROOT = Path(__file__).parent.parent.parent
_CHUNK = 1 << 20  # what a core's cache holds, so that the kernel reads ahead while it is hashed
# 2.5 G weights, in bfloat16 5.02 GB.
_LARGE = ModelShape(
    layers=23,
    hidden_size=3072,
    intermediate_size=8192,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32000,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--source", type=Path, help="a checkpoint to use in place of a made one")
    parser.add_argument("--rounds", type=int, help="of copying and converting in turn (default: 2)")
    parser.add_argument(
        "--folder", type=Path, help="where all is written, 16 GB (default: a temporary folder)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`speed_over_copy_and_hash` of files that are not in memory yet; `peak_rss_gb` of the converter's
    process, in 10^9 bytes; `repeated_bytes` of what a killed try had finished.

    Raises:
      RuntimeError: a zoo is not clean, or the one gone on with holds other components.
    """
    shape, shards = (TINY, 2) if args.quick else (_LARGE, 5)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        source = args.source
        if source is None:
            progress("writing the checkpoint")
            config = checkpoints.llama_config(shape, "bfloat16", 2048)
            source = checkpoints.write_base(folder / "checkpoint", config, 0, shards)
        total = sum(t.nbytes for t in open_source(source).tensors.values())
        part = total // 8 if args.quick else 0
        copies, converted = [], []
        for _ in range(args.rounds or (1 if args.quick else 2)):
            copies.append(_copy_and_hash(source, folder / "copy"))
            zoo = folder / "zoo"
            shutil.rmtree(zoo, ignore_errors=True)
            converted.append(_convert(source, zoo, part))
        wanted = sorted(os.listdir(zoo / "components"))
        shutil.rmtree(zoo)
        killed = _kill_and_go_on(source, zoo, part, total)
        if sorted(os.listdir(zoo / "components")) != wanted:
            raise RuntimeError("what was gone on with became another zoo")
        problems = fsck(Zoo.open(zoo))
        if problems:
            raise RuntimeError(f"the zoo is not clean: {problems[:3]}")
    ratios = [c["seconds"] / z["seconds"] for c, z in zip(copies, converted, strict=True)]
    peak = max([z["peak_bytes"] for z in converted] + [killed["peak_bytes"]])
    return {
        "convert": {
            "speed_over_copy_and_hash": median(ratios),
            "peak_rss_gb": round(peak / 1e9, 3),
            "repeated_bytes": killed["repeated_bytes"],
        },
        "detail": {
            "bytes": total,
            "components": len(wanted),
            "shards": shards,
            "copy_and_hash": copies,
            "convert": converted,
            "killed": killed,
        },
    }


def _copy_and_hash(source: Path, target: Path) -> dict[str, float]:
    """Every file read once, hashed, and written; then forced to the disk, as the converter does."""
    progress("copying and hashing")
    target.mkdir()
    _forget(source)
    buffer = memoryview(bytearray(_CHUNK))
    begin = time.perf_counter()
    for file in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as read, (target / file.name).open("xb", 0) as write:
            while count := read.readinto(buffer):
                digest.update(buffer[:count])
                write.write(buffer[:count])
    written = time.perf_counter() - begin
    for file in target.iterdir():
        _sync(file)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return {"seconds": round(seconds, 3), "before_sync_s": round(written, 3)}


def _convert(source: Path, zoo: Path, part: int) -> dict[str, Any]:
    progress("converting")
    _forget(source)
    begin = time.perf_counter()
    said = json.loads(_child(source, zoo, part, 0).stdout.splitlines()[-1])
    seconds = time.perf_counter() - begin
    return {"seconds": round(seconds, 3), "peak_bytes": said["peak_bytes"]} | _new(said)


def _kill_and_go_on(source: Path, zoo: Path, part: int, total: int) -> dict[str, Any]:
    progress("converting, killed half way")
    killed = _child(source, zoo, part, total // 2, -signal.SIGKILL)
    if Zoo.open(zoo).chains():
        raise RuntimeError(f"there is a model though its converter was killed: {killed.stderr}")
    opened = Zoo.open(zoo)
    (journal,) = (zoo / FOLDER).iterdir()
    finished = sum(opened.component(i).nbytes for i in read_json(journal).values())
    progress("going on")
    again = _convert(source, zoo, part)
    return again | {
        "killed_at_bytes": total // 2,
        "finished_bytes": finished,
        "repeated_bytes": finished + again["new_bytes"] - total,
    }


def _child(source: Path, zoo: Path, part: int, kill: int, code: int = 0) -> Any:
    argv = [sys.executable, "-m", "bench.convert_child", source, zoo, part, kill]
    done = subprocess.run(
        [str(a) for a in argv],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode != code:
        raise RuntimeError(f"the converter ended with {done.returncode}: {done.stderr[-2000:]}")
    return done


def _new(said: dict[str, Any]) -> dict[str, int]:
    """What the converter says it had to write."""
    found = [m for n in said["notes"] if (m := re.search(r"(\d+) of \d+ bytes are new", n))]
    return {"new_bytes": int(found[0][1])}


def _forget(source: Path) -> None:
    """Asks the kernel to forget the files, so that they are read from the disk."""
    if hasattr(os, "posix_fadvise"):
        for file in source.iterdir():
            _sync(file)
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _sync(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
