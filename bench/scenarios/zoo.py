"""What a zoo stores of many fine-tunes over what they take apart, through the converter onto the disk."""

import argparse
import contextlib
import dataclasses
import filecmp
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import checkpoints, finetunes
from bench.finetunes import Kind, Made
from bench.models import MODEL_250M, TINY, ModelShape
from bench.report import progress
from checkpoints import hf, peft
from checkpoints.export import export
from checkpoints.progress import Progress
from checkpoints.source import open_source
from jblock.adapt.quantization import quantize_chain
from jblock.zoo import gc
from jblock.zoo.fsck import fsck
from jblock.zoo.inventory import inventory
from jblock.zoo.records import Chain
from jblock.zoo.store import Zoo

_QUIET = Progress(bars=False, quiet=True)
_BASES = ("base", "mixture")
_MAX_POSITION = 2048
_FIRST_SEED = 99  # of fine-tunes; the bases have 0 and 1
_END = "<!-- end -->\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument(
        "--folder", type=Path, help="where zoo and checkpoints are made (default: a temporary one)"
    )
    parser.add_argument(
        "--table", type=Path, help="write the table of situations into this page, between its marks"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`stored_over_logical` of 64 tenants; `situations`: one fine-tune of each kind beside its base.

    Raises:
      RuntimeError: the zoo is not clean at the end, or an export differs from its source.
    """
    shape = dataclasses.replace(TINY, layers=3) if args.quick else MODEL_250M
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        bases = _write_bases(folder, shape)
        counts = [
            (kind, -(-count // 8) if args.quick else count) for kind, count in finetunes.TENANTS
        ]
        result = _sharing(folder, bases, counts)
        situations = list(_situations(folder, bases))
    result |= {"situations": situations}
    if args.table:
        write_tables(args.table, result)
    return result


def write_tables(page: Path, result: dict[str, Any]) -> None:
    """Replaces what a page has between `<!-- bench zoo: NAME -->` and the end mark, for both names.

    Raises:
      SystemExit: it lacks a mark.
    """
    text = page.read_text()
    for name, table in (
        ("situations", _situation_table(result)),
        ("tenants", _tenant_table(result)),
    ):
        mark = f"<!-- bench zoo: {name} -->\n"
        head, begin, rest = text.partition(mark)
        _, end, tail = rest.partition(_END)
        if not begin or not end:
            raise SystemExit(f"--table {page}: it lacks {mark.strip()} or {_END.strip()} behind it")
        text = head + begin + table + end + tail
    page.write_text(text)


def _situation_table(result: dict[str, Any]) -> str:
    lines = [
        "| fine-tune | logical | stored | share | components, deltas | blocks (of the base) | cuts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["situations"]:
        cuts = row["cuts"]
        shown = ", ".join(cuts if len(cuts) <= 3 else [*cuts[:3], "..."])
        lines.append(
            f"| {row['situation']} | {_bytes(row)} | {row['components']}, {row['deltas']} | "
            f"{row['blocks']} ({row['blocks_of_base']}) | "
            f"{f'{len(cuts)}: before {shown}' if cuts else 'none'} |"
        )
    return "\n".join(lines) + "\n"


def _tenant_table(result: dict[str, Any]) -> str:
    detail = result["detail"]
    lines = ["| tenants | logical | stored | share |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {k['tenants']}: {k['fine_tune']} | {_bytes(k)} |" for k in detail["kinds"].values()
    ]
    lines.append(f"| the two bases, no tenants | | {_size(detail['bases_stored_bytes'])} | |")
    lines.append(f"| all {detail['tenants']} | {_bytes(detail)} |")
    return "\n".join(lines) + "\n"


def _bytes(row: dict[str, Any]) -> str:
    logical, stored = row["logical_bytes"], row["stored_bytes"]
    return f"{_size(logical)} | {_size(stored)} | {stored / logical:.2%}"


def _write_bases(folder: Path, shape: ModelShape) -> dict[str, Path]:
    """The two checkpoints everything is tuned from, equal in size."""
    dense = checkpoints.llama_config(shape, "bfloat16", _MAX_POSITION)
    mixture = checkpoints.mixtral_config(shape, finetunes.EXPERTS, _MAX_POSITION)
    progress("writing the bases")
    return {
        name: checkpoints.write_base(folder / "bases" / name, config, seed)
        for seed, (name, config) in enumerate(zip(_BASES, (dense, mixture), strict=True))
    }


def _base_of(kind: Kind) -> str:
    return _BASES[kind.mixture]


def _sharing(
    folder: Path, bases: dict[str, Path], counts: Sequence[tuple[Kind, int]]
) -> dict[str, Any]:
    """All tenants in one zoo."""
    path = folder / "zoo"
    for name in _BASES:
        hf.convert(bases[name], path, name, _QUIET)
    zoo = Zoo.open(path)
    stored = [_stored(zoo)]
    logical: dict[str, int] = {}
    kinds: dict[str, dict[str, Any]] = {}
    seeds = itertools.count()
    first: dict[str, int] = {}
    for kind, count in counts:
        progress(f"{count} tenants: {kind.name}")
        for i in range(count):
            name, seed = f"{kind.slug}-{i}", next(seeds)
            first.setdefault(kind.slug, seed)
            with _made(folder, kind, bases, seed) as made:
                _add(zoo, kind, name, made)
                logical[name] = _logical(made, bases[_base_of(kind)])
        stored.append(_stored(zoo))
        kinds[kind.slug] = {
            "fine_tune": kind.name,
            "tenants": count,
            "logical_bytes": sum(logical[f"{kind.slug}-{i}"] for i in range(count)),
            "stored_bytes": stored[-1] - stored[-2],
        }
    for kind, _ in counts:
        _check_export(folder, zoo, kind, bases, first[kind.slug])
    progress("fsck")
    problems = fsck(zoo)
    if problems:
        raise RuntimeError(f"the zoo is not clean: {problems[:3]}")
    totals, on_disk = inventory(zoo)["totals"], _on_disk(path)
    shutil.rmtree(path)
    whole = sum(logical.values())
    return {
        "zoo": {"stored_over_logical": round(totals["stored_bytes"] / whole, 4)},
        "detail": {
            "dtype": "bfloat16, adapters float32",
            "tenants": len(logical),
            "logical_bytes": whole,
            "stored_bytes": totals["stored_bytes"],
            "bases_stored_bytes": stored[0],
            "kinds": kinds,
            "components": totals["components"],
            "deltas": totals["deltas"],
            "on_disk_over_logical": round(on_disk / whole, 4),
            "on_disk_bytes": on_disk,
            "fsck_problems": len(problems),
            "exports_identical": [kind.slug for kind, _ in counts],
        },
    }


def _situations(folder: Path, bases: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Each fine-tune alone in a zoo with its base: what it adds, and how the two are served."""
    for mixture, base in enumerate(_BASES):
        path = folder / f"zoo-{base}"
        hf.convert(bases[base], path, base, _QUIET)
        zoo = Zoo.open(path)
        for kind in finetunes.SITUATIONS:
            if kind.mixture != bool(mixture):
                continue
            progress(f"situation: {kind.name}")
            before = inventory(zoo)["totals"]
            with _made(folder, kind, bases, seed=1) as made:
                chain = _add(zoo, kind, kind.slug, made)
                logical = _logical(made, bases[base])
            found = inventory(zoo)
            after = found["totals"]
            if kind.quantize is not None:
                (own,) = (row for row in found["chains"] if row["name"] == chain.name)
                logical = own["logical_bytes"]
            yield {
                "situation": kind.name,
                "logical_bytes": logical,
                "stored_bytes": after["stored_bytes"] - before["stored_bytes"],
                "components": after["components"] - before["components"],
                "deltas": after["deltas"] - before["deltas"],
                **_cut(zoo, chain, base),
            }
            for name in (chain.name, f"{chain.name}-model"):
                if kind.quantize is None and zoo.versions(name):
                    gc.remove(zoo, name)
            gc.collect(zoo, dry_run=False)
        shutil.rmtree(path)


def _cut(zoo: Zoo, chain: Chain, base: str) -> dict[str, Any]:
    """How the zoo's partition serves a chain."""
    served = {name: zoo.chain(name) for name in zoo.chains()}
    blocks = zoo.block_plan(served).blocks
    theirs = {block.components for block in blocks[base]}
    inner = [block.first for block in blocks[chain.name][2:-1]]
    return {
        "blocks": len(blocks[chain.name]),
        "blocks_of_base": sum(b.components in theirs for b in blocks[chain.name]),
        "cuts": [_place(zoo, chain, first) for first in inner],
    }


def _place(zoo: Zoo, chain: Chain, step: int) -> str:
    """A step by its kind and layer; layers count from 0, as in the names of tensors."""
    kinds = [zoo.component(s.component).spec.kind for s in chain.steps[: step + 1]]
    layer = kinds.count("attention") - 1
    return f"layer {layer}" if kinds[-1] == "attention" else f"the {kinds[-1]} of {layer}"


@contextlib.contextmanager
def _made(folder: Path, kind: Kind, bases: dict[str, Path], seed: int) -> Iterator[Made]:
    """One fine-tune's files, while they are needed."""
    where = folder / "source"
    where.mkdir()
    try:
        yield kind.make(where, bases[_base_of(kind)], seed + _FIRST_SEED)
    finally:
        shutil.rmtree(where)


def _add(zoo: Zoo, kind: Kind, name: str, made: Made) -> Chain:
    """What a user does to add it."""
    base = _base_of(kind)
    if kind.quantize is not None:
        return quantize_chain(zoo, zoo.chain(base), name, kind.quantize)
    if made.model is not None:
        base = name if made.adapter is None else f"{name}-model"
        chain, _ = hf.convert(made.model, zoo.path, base, _QUIET)
    if made.adapter is not None:
        chain, _ = peft.convert(made.adapter, zoo.path, base, name, _QUIET)
    return chain


def _logical(made: Made, base: Path) -> int:
    """Tensor bytes that a deployment of its own takes: its checkpoint, or its base's, and its adapter."""
    nbytes = _tensor_bytes(base if made.model is None else made.model)
    if made.adapter is not None:
        nbytes += _tensor_bytes(made.adapter, "adapter_model")
    return nbytes


def _tensor_bytes(folder: Path, stem: str = "model") -> int:
    return sum(t.nbytes for t in open_source(folder, stem).tensors.values())


def _check_export(folder: Path, zoo: Zoo, kind: Kind, bases: dict[str, Path], seed: int) -> None:
    """Exports the first tenant of a kind and compares every file with those it was made from."""
    progress(f"export: {kind.name}")
    out = folder / "exported"
    with _made(folder, kind, bases, seed) as made:
        source = made.adapter or made.model
        if source is None:
            raise RuntimeError(f"{kind.slug} was made from no files")
        export(zoo.path, f"{kind.slug}-0", out, _QUIET)
        names = sorted({*os.listdir(source), *os.listdir(out)})
        _, different, missing = filecmp.cmpfiles(source, out, names, shallow=False)
        shutil.rmtree(out)
    if different or missing:
        raise RuntimeError(f"{kind.slug}: the export differs in {different + missing}")


def _stored(zoo: Zoo) -> int:
    return int(inventory(zoo)["totals"]["stored_bytes"])


def _on_disk(root: Path) -> int:
    """Bytes that all files and folders take on the disk, in whole blocks."""
    return sum(
        512 * os.lstat(os.path.join(folder, name)).st_blocks
        for folder, folders, files in os.walk(root)
        for name in (*folders, *files)
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} KB"
