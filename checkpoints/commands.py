"""What the commands do that need nothing but a zoo; `sources.py` has those that read others' files."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from checkpoints.outcome import Outcome, added, lines, progress_of


def compress(args: argparse.Namespace) -> Outcome:
    """Makes a copy of a fine-tune that is deltas on its base."""
    from jblock.adapt.compression import CODECS, compress_chain
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    chain, base = (zoo.chain(*name_and_version(n)) for n in (args.name, args.base))
    name = args.copy_name or f"{chain.name}-small"
    steps = zip(chain.steps, base.steps, strict=False)
    changed = [a.component for a, b in steps if a.component != b.component]
    total = 2 * sum(zoo.component(c).nbytes for c in changed)
    with progress_of(args).bar(name, total) as advance:
        made = compress_chain(zoo, chain, base, name, args.budget, args.codec or CODECS, advance)
    codecs = ", ".join(f"{n} x {label}" for label, n in made.derived["codecs"].items())
    return _lossy(made, "changed components", f"codecs: {codecs}")


def quantize(args: argparse.Namespace) -> Outcome:
    """Makes a quantized copy of a model."""
    from jblock.adapt.quantization import quantise_chain
    from jblock.blocks.quant_spec import QuantSpec
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    chain = zoo.chain(*name_and_version(args.name))
    spec = QuantSpec(bits=args.bits, group=args.group)
    name = args.copy_name or f"{chain.name}-int{args.bits}"
    total = sum(zoo.component(s.component).nbytes for s in chain.steps)
    with progress_of(args).bar(name, total) as advance:
        made = quantise_chain(zoo, chain, name, spec, advance)
    return _lossy(made, "weights")


def merge(args: argparse.Namespace) -> Outcome:
    """Adds the weighted sum of adapters."""
    from checkpoints.errors import CheckpointError
    from checkpoints.merge import merge

    adapters = []
    for text in args.adapter:
        name, _, weight = text.rpartition("=")
        try:
            adapters.append((name, float(weight)))
        except ValueError:
            raise CheckpointError(
                f"--adapter {text!r}: give a model and its weight, as A=0.7"
            ) from None
    chain, new = merge(Path(args.zoo), args.name, adapters, args.combine, progress_of(args))
    return added(chain, new)


def profile(args: argparse.Namespace) -> Outcome:
    """Measures what blocks take on this machine."""
    from checkpoints import printing
    from checkpoints.profile import profile

    programs = Path(args.programs) if args.programs else None
    data = profile(Path(args.zoo), args.names, programs, progress_of(args))
    return Outcome(data, lambda: printing.print_profile(data))


def list_(args: argparse.Namespace) -> Outcome:
    """Lists the models, or the edges."""
    from checkpoints import printing
    from jblock.zoo.inventory import edge_inventory, inventory
    from jblock.zoo.store import Zoo

    if args.edges:
        found = edge_inventory(Zoo.open(args.zoo), accepted(args))
        return Outcome(found, lambda: printing.print_edges(found))
    data = inventory(Zoo.open(args.zoo))
    shown = {key: data[key] for key in ("zoo", "chains", "totals")}
    return Outcome(shown, lambda: printing.print_chains(data))


def inspect(args: argparse.Namespace) -> Outcome:
    """Shows what a model is made of and what it shares, or the whole zoo."""
    from checkpoints import printing
    from jblock.zoo.inventory import inventory
    from jblock.zoo.partition import blocks
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    data = inventory(zoo, args.name)
    live = {name: zoo.chain(name) for name in zoo.chains()}
    cut = blocks(live, zoo.cut_cost(live))
    for row in data["chains"]:
        if row["live"]:
            row["blocks"] = len(cut[row["name"]])
    return Outcome(data, lambda: printing.print_inventory(data, args.name, args.details))


def export(args: argparse.Namespace) -> Outcome:
    """Writes the files a model was made from."""
    name, version = name_and_version(args.name)
    if args.format == "orbax":
        from checkpoints.orbax.export import export
    else:
        from checkpoints.export import export
    files = export(Path(args.zoo), name, Path(args.out), progress_of(args), version)
    data = {"name": args.name, "out": args.out, "files": files}
    return Outcome(data, lines(f"{args.name} written to {args.out}: {len(files)} files"))


def diff(args: argparse.Namespace) -> Outcome:
    """Compares two models."""
    from checkpoints import printing
    from jblock.zoo.diff import diff
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    a, b = (zoo.chain(*name_and_version(n)) for n in (args.a, args.b))
    total = sum(zoo.component(s.component).nbytes for c in (a, b) for s in c.steps)
    with progress_of(args).bar("comparing", total) as advance:
        data = diff(zoo, a, b, advance)
    return Outcome(data, lambda: printing.print_diff(data))


def copy(args: argparse.Namespace) -> Outcome:
    """Copies models into another zoo."""
    from checkpoints.printing import size
    from jblock.zoo.store import Zoo
    from jblock.zoo.transfer import copy

    source, target = Zoo.open(args.zoo), Zoo.create(args.to)
    rows: list[dict[str, Any]] = []
    for text in args.names or source.chains():
        name, version = name_and_version(text)
        with progress_of(args).bar(text, _size(source, source.chain(name, version))) as advance:
            chain, sent = copy(source, target, name, version, advance)
        rows.append({"name": chain.name, "version": chain.version, "sent_bytes": sent})
    told = [f"{r['name']}@{r['version']}: {size(r['sent_bytes'])} sent" for r in rows]
    return Outcome({"to": str(target.path), "models": rows}, lines(*told))


def equivalence(args: argparse.Namespace) -> Outcome:
    """Finds and measures what may replace what."""
    from checkpoints import printing
    from checkpoints.equivalence import Options, run
    from jblock.zoo.store import Zoo

    options = Options(
        names=args.names,
        cosine=args.cosine,
        text=Path(args.text) if args.text else None,
        items=args.items,
        tokens=args.tokens,
        max_items=args.max_items,
        accepted=accepted(args),
        suffix=args.suffix,
    )
    data = run(Zoo.open(args.zoo), options, progress_of(args))
    return Outcome(data, lambda: printing.print_equivalence(data))


def stitch(args: argparse.Namespace) -> Outcome:
    """Joins two models."""
    from checkpoints import approximate, printing
    from jblock.zoo.store import Zoo

    data = approximate.stitch(
        Zoo.open(args.zoo),
        args.lower,
        args.upper,
        args.at,
        args.name,
        _training_data(args, args.upper),
        _schedule(args),
        args.inner,
        progress_of(args),
    )
    return Outcome(data, lambda: printing.print_approximate(data))


def surrogate(args: argparse.Namespace) -> Outcome:
    """Makes a smaller substitute for layers of a model."""
    from checkpoints import approximate, printing
    from jblock.zoo.store import Zoo

    data = approximate.surrogate(
        Zoo.open(args.zoo),
        args.name,
        args.layers,
        args.keep,
        args.to,
        _training_data(args, args.name),
        _schedule(args),
        progress_of(args),
    )
    return Outcome(data, lambda: printing.print_approximate(data))


def _training_data(args: argparse.Namespace, name: str) -> Any:
    from checkpoints.approximate import Data
    from checkpoints.probes import by_model

    train_items = getattr(args, "train_items", None)
    return Data(
        train=Path(args.train),
        train_items=Path(train_items) if train_items else None,
        text=Path(args.text),
        items=by_model(args.items, [name]).get(name),
        tokens=args.tokens,
        max_items=args.max_items,
    )


def _schedule(args: argparse.Namespace) -> Any:
    from jblock.adapt.training import Schedule

    return Schedule(
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch_tokens=args.batch_tokens,
        seed=args.seed,
    )


def rm(args: argparse.Namespace) -> Outcome:
    """Removes a model or an edge."""
    from checkpoints.errors import CheckpointError
    from checkpoints.printing import size
    from jblock.zoo import edges, gc
    from jblock.zoo.store import Zoo

    if (args.name is None) is (args.edge is None):
        raise CheckpointError("rm takes the name of a model, or --edge with the id of an edge")
    zoo = Zoo.open(args.zoo)
    if args.edge is not None:
        id_ = edges.find_edge(zoo, args.edge)
        edges.remove_edge(zoo, id_)
        removed = [f"edge {id_}"]
    else:
        removed = gc.remove(zoo, *name_and_version(args.name))
    nbytes = sum(g.nbytes for g in gc.collect(zoo, dry_run=True))
    last = f"{size(nbytes)} are used by nothing now: 'jblock-convert gc --delete' frees them"
    data = {"removed": removed, "garbage_bytes": nbytes}
    return Outcome(data, lines(*(f"{r} removed" for r in removed), last))


def gc(args: argparse.Namespace) -> Outcome:
    """Removes what nothing names."""
    from checkpoints.printing import size
    from jblock.zoo import gc
    from jblock.zoo.store import Zoo

    found = gc.collect(Zoo.open(args.zoo), dry_run=not args.delete)
    nbytes = sum(g.nbytes for g in found)
    each = [f"{g.kind[:-1]} {g.id}: {size(g.nbytes)}" for g in found]
    done = "removed" if args.delete else "would be removed: give --delete to do it"
    rows = [dataclasses.asdict(g) for g in found]
    data = {"garbage": rows, "bytes": nbytes, "deleted": bool(args.delete)}
    return Outcome(data, lines(*each, f"{len(found)} entries, {size(nbytes)}, {done}"))


def fsck(args: argparse.Namespace) -> Outcome:
    """Checks, and on demand repairs, a zoo."""
    from jblock.zoo.fsck import fsck
    from jblock.zoo.inventory import stored_bytes
    from jblock.zoo.repair import repair
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    repaired = repair(zoo) if args.repair else []
    with progress_of(args).bar("checking", stored_bytes(zoo)) as advance:
        problems = fsck(zoo, advance)
    last = f"{zoo.path}: {f'{len(problems)} problems' if problems else 'clean'}"
    data = {"zoo": str(zoo.path), "repaired": repaired, "problems": problems}
    return Outcome(data, lines(*repaired, *problems, last), 1 if problems else 0)


def accepted(args: argparse.Namespace) -> Any:
    """What the operator accepts of edges, by --policy and --threshold.

    Raises:
      CheckpointError: a threshold that is not MEASURE=WORST.
    """
    from checkpoints.errors import CheckpointError
    from jblock.zoo.acceptance import AcceptancePolicy

    thresholds = {}
    for text in args.threshold:
        name, _, value = text.partition("=")
        try:
            thresholds[name] = float(value)
        except ValueError:
            raise CheckpointError(
                f"--threshold {text!r}: give MEASURE=WORST, as in top1_agreement=0.99"
            ) from None
    return AcceptancePolicy(policy=args.policy, thresholds=thresholds)


def name_and_version(text: str) -> tuple[str, int | None]:
    """Splits "name@version"; a name alone stands for the live version."""
    name, at, version = text.partition("@")
    return (name, int(version)) if at and version.isdecimal() else (text, None)


def _lossy(made: Any, what: str, *texts: str) -> Outcome:
    """The outcome of a copy that is smaller, and not exact."""
    from checkpoints.printing import size

    derived = made.derived
    base = f" on {derived['base']}" if "base" in derived else ""
    data = {"name": made.name, "version": made.version, "policy": made.policy, **derived}
    return Outcome(
        data,
        lines(
            f"{made.name}@{made.version} from {derived['chain']}{base}: "
            f"{size(derived['bytes_before'])} of {what} are {size(derived['bytes_after'])}, "
            f"relative error {derived['parameter_error']:.2%}",
            *texts,
            "it is served where it is named, to requests that accept policy near; measure what it costs "
            "before you rely on it",
        ),
    )


def _size(zoo: Any, chain: Any) -> int:
    deltas = sum(zoo.delta(d).nbytes for s in chain.steps for d in s.deltas)
    return deltas + sum(zoo.component(s.component).nbytes for s in chain.steps)
