"""How long a search takes for components that are alike, on a zoo on disk whose files are not cached."""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.report import progress
from jblock.adapt import substitution
from jblock.blocks.spec import FfnSpec
from jblock.zoo.store import Zoo

_FAMILY = 10  # components that are alike: one, and nine tuned from it
_LEAST = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument(
        "--folder", type=Path, help="where the zoo is made (default: a temporary one)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`seconds`: of the whole search, with nothing of the files in memory at its beginning."""
    count = 40 if args.quick else args.components
    width = 32 if args.quick else 1024
    spec = FfnSpec(hidden_size=width, intermediate_size=width * 43 // 32, norm_eps=1e-5)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        zoo = Zoo.create(Path(folder) / "zoo")
        progress(f"writing {count} components")
        wanted = _fill(zoo, spec, count)
        used = {i: {"base", "other"} for i in wanted.values()} | {i: {"tuned"} for i in wanted}
        nbytes = sum(zoo.component(i).nbytes for i in used)
        dropped = _drop_cache(zoo.path)
        progress(f"searching {nbytes / 1e9:.2f} GB")
        begin = time.perf_counter()
        substitution.read_sketches(zoo, [zoo.component(id_) for id_ in used])
        sketching = time.perf_counter() - begin
        _drop_cache(zoo.path)
        read: list[int] = []
        begin = time.perf_counter()
        found = substitution.search(zoo, used, _LEAST, read.append)
        cold = time.perf_counter() - begin
        begin = time.perf_counter()
        substitution.search(zoo, used, _LEAST)
        again = time.perf_counter() - begin
    pairs = {(c.original, c.substitute) for c in found.candidates}
    right = {pair for pair in pairs if pair in wanted.items()}
    return {
        "equivalence": {
            "seconds": round(cold, 3),
            "found": len(right),
            "missed": len(wanted) - len(right),
            "surplus": len(pairs - right),
        },
        "detail": {
            "components": len(used),
            "component_bytes": nbytes // len(used),
            "bytes": nbytes,
            "bytes_compared_in_full": sum(read),
            "sketches_alone_s": round(sketching, 3),
            "seconds_files_in_memory": round(again, 3),
            "files_dropped_from_memory": dropped,
            "pairs_of_like_sketches": found.alike,
            "pairs_in_all": len(used) * (len(used) - 1) // 2,
        },
    }


def _fill(zoo: Zoo, spec: FfnSpec, count: int) -> dict[str, str]:
    """Adds families of components; returns tuned id -> id it was tuned from."""
    rng = np.random.default_rng(0)
    shapes = spec.tensors()
    size = sum(int(np.prod(s)) for s in shapes.values())
    # Windows of one long random row are as unlike each other as fresh ones, and cheaper to draw.
    pool = rng.standard_normal(2 * size + count * 1009, np.float32)
    tuned: dict[str, str] = {}

    def put(values: np.ndarray) -> str:
        tensors, at = {}, 0
        for name, shape in shapes.items():
            end = at + int(np.prod(shape))
            tensors[name] = values[at:end].reshape(shape).astype(ml_dtypes.bfloat16)
            at = end
        return zoo.put_component(spec, tensors)

    for first in range(0, count, _FAMILY):
        base = pool[first * 1009 : first * 1009 + size]
        leader = put(base)
        for i in range(1, min(_FAMILY, count - first)):
            start = (count - first - i) * 1009 + size // 2
            tuned[put(base + 0.03 * i * pool[start : start + size])] = leader
    return tuned


def _drop_cache(root: Path) -> bool:
    """Asks the kernel to forget the files under a folder; whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for folder, _, names in os.walk(root):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    return True
