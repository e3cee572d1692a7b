"""How long a search takes for components that are alike, on a zoo on disk whose files are not cached."""

import argparse
import os
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bench.report import progress
from jblock.adapt import candidates, sketch
from jblock.blocks.spec import FfnSpec
from jblock.zoo.store import Zoo

_VERSIONS = 9  # of each fine-tune, with --alike: eight neighbors each
_FAMILY = 10  # components that are alike: one, and nine tuned from it
_LEAST = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--components", type=int, default=1000)
    parser.add_argument(
        "--alike",
        action="store_true",
        help="instead the search from sketches in one family of 10,000 and of 40,000 that are all alike",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the zoo is made (default: a temporary one)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`seconds`: of the whole search, with nothing of the files in memory at its beginning; with --alike see
    `_alike`."""
    if args.alike:
        return _alike(200 if args.quick else 10_000, 64 if args.quick else 1000)
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
        candidates.read_sketches(zoo, [zoo.component(id_) for id_ in used])
        sketching = time.perf_counter() - begin
        _drop_cache(zoo.path)
        read: list[int] = []
        begin = time.perf_counter()
        found = candidates.search(zoo, used, _LEAST, read.append)
        cold = time.perf_counter() - begin
        begin = time.perf_counter()
        candidates.search(zoo, used, _LEAST)
        again = time.perf_counter() - begin
    pairs = {(c.original, c.substitute) for c in found.candidates}
    right = {pair for pair in pairs if pair in wanted.items()}
    return {
        "equivalence": {
            "seconds": round(cold, 3),
            "found": len(right),
            "missed": len(wanted) - len(right),
            "surplus": sum(not _related(p, wanted) for p in pairs),
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


def _related(pair: tuple[str, str], tuned: dict[str, str]) -> bool:
    """Whether both are of one family: a component may have several counterparts in its own."""
    one, other = (tuned.get(i, i) for i in pair)
    return one == other


def _alike(count: int, checked: int) -> dict[str, Any]:
    """The search from sketches in one family: versions of many fine-tunes of one base, nine of each, as
    components of 0.5 MB in bfloat16 have them (16,384 of 262,144 elements). All pairs have a cosine over
    `_LEAST`, and each component eight neighbors that are nearer than the rest.

    `alike_10000_s`: seconds for 10,000 of them. `alike_10000_gb`: peak memory of the process up to then, the
    sketches and the interpreter with it. `alike_40000_over_10000`: CPU time for four times as many over that:
    by the clock it would tell what else the machine does. `recall`: of the eight nearest by brute force, for
    `checked` of them.
    """
    found: dict[int, tuple[float, float]] = {}
    recall = peak = 0.0
    for factor in (1, 4):
        progress(f"drawing {factor * count} sketches")
        sketches = _versions(factor * count)
        progress("searching")
        cpu, begin = time.process_time(), time.perf_counter()
        pairs = sketch.alike(sketches, _LEAST, [1] * len(sketches))
        found[factor] = time.perf_counter() - begin, time.process_time() - cpu
        if factor == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
            progress("comparing some with all")
            recall = _recall(sketches, pairs, checked)
        del sketches, pairs
    return {
        "equivalence": {
            "alike_10000_s": round(found[1][0], 2),
            "alike_10000_gb": round(peak, 2),
            "alike_40000_over_10000": round(found[4][1] / found[1][1], 2),
            "recall": round(recall, 4),
        },
        "detail": {
            "components": count,
            "alike_10000_cpu_s": round(found[1][1], 2),
            "alike_40000_s": round(found[4][0], 2),
            "alike_40000_cpu_s": round(found[4][1], 2),
            "checked": checked,
        },
    }


def _versions(count: int) -> np.ndarray:
    """float32 [count, elements]: sketches of versions of fine-tunes of one base, in no order."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(sketch.ELEMENTS, np.float32)
    order = rng.permutation(count)
    out = np.empty((count, sketch.ELEMENTS), np.float32)
    for first in range(0, count, _VERSIONS):
        rows = order[first : first + _VERSIONS]
        tune = base + 0.15 * rng.standard_normal(sketch.ELEMENTS, np.float32)
        out[rows] = tune + 0.08 * rng.standard_normal((len(rows), sketch.ELEMENTS), np.float32)
    return out


def _recall(unit: np.ndarray, pairs: list[tuple[int, int, float]], checked: int) -> float:
    """Share of the eight nearest rows, by brute force, that are among the pairs found."""
    near: dict[int, set[int]] = defaultdict(set)
    for i, j, _ in pairs:
        near[i].add(j)
        near[j].add(i)
    rows = np.random.default_rng(1).choice(len(unit), checked, replace=False)
    hits = 0
    for begin in range(0, checked, 100):
        some = rows[begin : begin + 100]
        cosines = unit[some] @ unit.T
        cosines[np.arange(len(some)), some] = -1
        nearest = np.argpartition(-cosines, _VERSIONS - 1, axis=1)[:, : _VERSIONS - 1]
        hits += sum(len(near[row] & set(n)) for row, n in zip(some, nearest.tolist(), strict=True))
    return hits / (checked * (_VERSIONS - 1))


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
