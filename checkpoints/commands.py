"""What the commands do that need nothing but a zoo; `sources.py` has those that read others' files."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from checkpoints.outcome import Outcome, added, lines, progress_of
from jblock.zoo.records import DamagedError, ZooError, printable


def compress(args: argparse.Namespace) -> Outcome:
    """Makes a copy of a fine-tune that is deltas on its base."""
    from jblock.adapt import estimate
    from jblock.adapt.compression import CODECS, compress_chain
    from jblock.zoo.store import Zoo

    zoo, options = Zoo.open(args.zoo), _probe_options(args)
    chain, base = (zoo.checked_chain(*name_and_version(n)) for n in (args.name, args.base))
    name = args.copy_name or f"{chain.name}-small"
    steps = zip(chain.steps, base.steps, strict=False)
    changed = [a.component for a, b in steps if a.component != b.component]
    total = 2 * sum(zoo.component(c).nbytes for c in changed)
    codecs = args.codec or CODECS
    progress_of(args).note(f"{name}: encoding {estimate.encoding(zoo, changed, codecs)}")
    with progress_of(args).bar(name, total) as advance:
        made = compress_chain(zoo, chain, base, name, args.budget, codecs, advance)
    chosen = ", ".join(f"{n} x {label}" for label, n in made.derived["codecs"].items())
    lost = f"{made.derived['change_error']:.2%} of what the fine-tune changed is lost"
    measured = _measured(args, zoo, made, chain, options, "change_error")
    return _lossy(made, "changed components", measured, lost, f"codecs: {chosen}")


def quantize(args: argparse.Namespace) -> Outcome:
    """Makes a quantized copy of a model."""
    from jblock.adapt import estimate
    from jblock.adapt.quantization import quantize_chain
    from jblock.blocks.quant_spec import QuantSpec
    from jblock.zoo.store import Zoo

    zoo, options = Zoo.open(args.zoo), _probe_options(args)
    chain = zoo.checked_chain(*name_and_version(args.name))
    spec = QuantSpec(bits=args.bits, group=args.group)
    name = args.copy_name or f"{chain.name}-int{args.bits}"
    ids = list(dict.fromkeys(s.component for s in chain.steps))
    progress_of(args).note(f"{name}: encoding {estimate.encoding(zoo, ids, ('quantize',))}")
    total = sum(zoo.component(s.component).nbytes for s in chain.steps)
    with progress_of(args).bar(name, total) as advance:
        made = quantize_chain(zoo, chain, name, spec, advance)
    lost = f"the weights are {made.derived['parameter_error']:.2%} off"
    measured = _measured(args, zoo, made, chain, options, "parameter_error")
    return _lossy(made, "weights", measured, lost)


def measure(args: argparse.Namespace) -> Outcome:
    """Measures one model beside another."""
    from checkpoints import printing
    from checkpoints.measure import measure
    from jblock.zoo.store import Zoo

    zoo, options = Zoo.open(args.zoo), _probe_options(args)
    model, against = (zoo.checked_chain(*name_and_version(n)) for n in (args.name, args.other))
    data = measure(zoo, model, against, options, accepted(args), progress_of(args))
    return Outcome(data, lambda: printing.print_measured(data))


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
    chain, new = merge(
        args.zoo, args.name, adapters, args.combine, progress_of(args), not args.no_activate
    )
    return added(args.zoo, chain, new)


def profile(args: argparse.Namespace) -> Outcome:
    """Measures what blocks take on this machine."""
    from checkpoints import printing
    from checkpoints.profile import profile

    programs = Path(args.programs) if args.programs else None
    data = profile(args.zoo, args.names, programs, progress_of(args))
    return Outcome(data, lambda: printing.print_profile(data))


def list_(args: argparse.Namespace) -> Outcome:
    """Lists the models, or the edges."""
    from checkpoints import printing
    from jblock.zoo.inventory import edge_inventory
    from jblock.zoo.listing import list_models
    from jblock.zoo.store import Zoo

    if args.edges:
        found = edge_inventory(Zoo.open(args.zoo), accepted(args))
        warn(found["problems"])
        return Outcome(found, lambda: printing.print_edges(found))
    data = list_models(Zoo.open(args.zoo))
    warn(data["problems"])
    return Outcome(data, lambda: printing.print_chains(data))


def inspect(args: argparse.Namespace) -> Outcome:
    """Shows what a model is made of and what it shares, or the whole zoo."""
    from checkpoints import printing
    from jblock.zoo.inventory import inventory
    from jblock.zoo.store import Zoo

    zoo = Zoo.open(args.zoo)
    data = inventory(zoo, args.name)
    served = {}
    for name in zoo.chains():
        with contextlib.suppress(ZooError):  # told by the inventory
            served[name] = zoo.chain(name)
    wanted = [row for row in data["chains"] if args.name is not None]
    for row in wanted:
        served[row["name"]] = zoo.chain(row["name"], row["version"])
    cut = zoo.block_plan(served).blocks
    for row in data["chains"]:
        if row["active"] or row in wanted:
            row["blocks"] = len(cut[row["name"]])
    warn(data["problems"])
    return Outcome(data, lambda: printing.print_inventory(data, args.name, args.details))


def export(args: argparse.Namespace) -> Outcome:
    """Writes the files a model was made from."""
    name, version = name_and_version(args.name)
    if args.format == "orbax":
        from checkpoints.orbax.export import export
    else:
        from checkpoints.export import export
    files = export(args.zoo, name, Path(args.out), progress_of(args), version)
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
    rows: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    left_out: list[str] = []
    for text in args.names or source.chains():
        name, version = name_and_version(text)
        activate = not args.no_activate
        try:
            with progress_of(args).bar(text, _size(source, source.chain(name, version))) as advance:
                copied = copy(source, target, name, version, advance, activate, problems)
        except DamagedError as e:
            if args.names:
                raise
            left_out.append(f"{text} is not copied: {e}")  # stops no other
            continue
        for one in copied:
            at = f"{one.chain.name}@{one.chain.version}"
            before = rows.get(at, {})  # a base that came along for another one
            rows[at] = {
                "name": one.chain.name,
                "version": one.chain.version,
                "digest": one.chain.digest,
                "source_version": one.source_version,
                "asked_for": one is copied[-1] or before.get("asked_for", False),
                "added": one.added or before.get("added", False),
                "active": one.active,
                "sent_bytes": one.sent_bytes + before.get("sent_bytes", 0),
            }
    told = [
        f"{at} (from {row['name']}@{row['source_version']}): {size(row['sent_bytes'])} sent, "
        f"{'added' if row['added'] else 'unchanged'}, {'' if row['active'] else 'not '}active"
        + ("" if row["asked_for"] else ", came along as a base")
        for at, row in rows.items()
    ]
    problems = [*left_out, *problems]
    warn(problems)
    data = {"to": target.storage.location, "models": list(rows.values()), "problems": problems}
    return Outcome(data, lines(*told), code=1 if left_out else 0)


def activate(args: argparse.Namespace) -> Outcome:
    """Makes a version the active one."""
    from checkpoints.errors import CheckpointError
    from jblock.zoo.store import Zoo

    name, version = name_and_version(args.name)
    if version is None:
        raise CheckpointError(f"activate takes NAME@VERSION or NAME@ALIAS, not {args.name!r}")
    return _pointed(Zoo.open(args.zoo).activate(name, version))


def rollback(args: argparse.Namespace) -> Outcome:
    """Makes the version active that was so before."""
    from jblock.zoo.store import Zoo

    return _pointed(Zoo.open(args.zoo).rollback(args.name))


def alias(args: argparse.Namespace) -> Outcome:
    """Gives a version another name, or takes one away."""
    from checkpoints.errors import CheckpointError
    from jblock.zoo.store import Zoo

    name, version = name_and_version(args.name)
    if (version is None) is not args.remove:
        raise CheckpointError("alias takes NAME@VERSION ALIAS, or --remove with NAME ALIAS")
    return _pointed(Zoo.open(args.zoo).alias(name, args.alias, version))


def history(args: argparse.Namespace) -> Outcome:
    """Shows what was done to a model."""
    from checkpoints import printing
    from jblock.zoo.store import Zoo

    data = _model(Zoo.open(args.zoo).model(args.name))
    return Outcome(data, lambda: printing.print_history(data))


def _pointed(model: Any) -> Outcome:
    data = _model(model)
    aliases = ", ".join(f"{model.name}@{a} is version {v}" for a, v in data["aliases"].items())
    active = f"{model.name}: version {model.active} is active"
    return Outcome(data, lines(active, *([aliases] if aliases else [])))


def _model(model: Any) -> dict[str, Any]:
    return {
        "name": model.name,
        "active": model.active,
        "versions": [{"version": v, "digest": e.digest} for v, e in sorted(model.versions.items())],
        "aliases": dict(sorted(model.aliases.items())),
        "history": [dict(line) for line in model.history],
    }


def warn(problems: list[str]) -> None:
    """Tells on stderr what could not be read; the command goes on."""
    for problem in dict.fromkeys(problems):
        print(f"jblock-convert: warning: {printable(problem)}", file=sys.stderr)


def equivalence(args: argparse.Namespace) -> Outcome:
    """Finds and measures what may replace what."""
    from checkpoints import printing
    from checkpoints.equivalence import Options, run
    from jblock.zoo.store import Zoo

    options = Options(
        names=args.names,
        cosine=args.cosine,
        probe=_probe_options(args),
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
        _training_data(args),
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
        _training_data(args),
        _schedule(args),
        progress_of(args),
    )
    return Outcome(data, lambda: printing.print_approximate(data))


def _training_data(args: argparse.Namespace) -> Any:
    from checkpoints.approximate import Data

    train_items = getattr(args, "train_items", None)
    return Data(
        train=Path(args.train),
        train_items=Path(train_items) if train_items else None,
        probe=_probe_options(args),
    )


def _probe_options(args: argparse.Namespace) -> Any:
    """What to measure on; None without --text."""
    from checkpoints.errors import CheckpointError
    from checkpoints.probes import ProbeOptions

    if args.text is None:
        if args.items:
            raise CheckpointError("--items needs --text: give held-out text to measure on too")
        return None
    return ProbeOptions(
        text=Path(args.text),
        items=args.items,
        tokens=args.tokens,
        row_tokens=args.row_tokens,
        max_items=args.max_items,
    )


def _measured(
    args: argparse.Namespace, zoo: Any, made: Any, chain: Any, options: Any, error: str
) -> dict[str, Any] | None:
    """The cost of a lossy copy end to end, recorded as an edge; None where there is nothing to measure on."""
    from checkpoints.measure import measure
    from jblock.zoo.acceptance import AcceptancePolicy
    from jblock.zoo.edge_records import Score

    if options is None:
        return None
    how = {
        k: v for k, v in made.derived.items() if k in ("command", "base", "budget", "bits", "group")
    }
    more = {error: Score(value=made.derived[error])}
    progress = progress_of(args)
    return measure(zoo, made, chain, options, AcceptancePolicy(), progress, how, more)


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
    problems: list[str] = []
    if args.edge is not None:
        id_ = edges.find_edge(zoo, args.edge)
        edges.remove_edge(zoo, id_)
        removed = [f"edge {id_}"]
    else:
        removed = gc.remove(zoo, *name_and_version(args.name), problems)
    nbytes = 0
    try:
        nbytes = sum(g.nbytes for g in gc.collect(zoo, dry_run=True, problems=problems))
    except ZooError as e:
        problems.append(str(e))  # what was to go is gone
    warn(problems)
    last = f"{size(nbytes)} are used by nothing now: 'jblock convert gc --delete' frees them"
    data = {"removed": removed, "garbage_bytes": nbytes}
    return Outcome(data, lines(*(f"{r} removed" for r in removed), last))


def gc(args: argparse.Namespace) -> Outcome:
    """Removes what nothing names."""
    from checkpoints.printing import size
    from jblock.zoo import gc
    from jblock.zoo.store import Zoo

    problems: list[str] = []
    found = gc.collect(Zoo.open(args.zoo), dry_run=not args.delete, problems=problems)
    warn(problems)
    nbytes = sum(g.nbytes for g in found)
    each = [f"{g.kind[:-1]} {g.id}: {size(g.nbytes)}" for g in found]
    done = "removed" if args.delete else "would be removed: give --delete to do it"
    rows = [dataclasses.asdict(g) for g in found]
    data = {"garbage": rows, "bytes": nbytes, "deleted": bool(args.delete), "problems": problems}
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
    last = f"{zoo.storage.location}: {f'{len(problems)} problems' if problems else 'clean'}"
    data = {"zoo": zoo.storage.location, "repaired": repaired, "problems": problems}
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


def name_and_version(text: str) -> tuple[str, str | None]:
    """Splits "name@version", where the version may be an alias; a name alone stands for the active one."""
    name, at, version = text.partition("@")
    return (name, version) if at else (text, None)


def _lossy(made: Any, what: str, measured: dict[str, Any] | None, *texts: str) -> Outcome:
    """The outcome of a copy that is smaller, and not exact."""
    from checkpoints import printing

    derived = made.derived
    base = f" on {derived['base']}" if "base" in derived else ""
    data = {"name": made.name, "version": made.version, "policy": made.policy, **derived}

    def show() -> None:
        small, large = printing.size(derived["bytes_after"]), printing.size(derived["bytes_before"])
        print(
            f"{made.name}@{made.version} from {derived['chain']}{base}: {large} of {what} are {small}"
        )
        for text in texts:
            print(text)
        if measured is None:
            print(
                "what that costs was not measured: give --text and --items, or run 'measure' later"
            )
        else:
            printing.print_measured(measured)
        print("it is served where it is named, to requests that accept policy near")

    return Outcome({**data, "measured": measured}, show)


def _size(zoo: Any, chain: Any) -> int:
    deltas = sum(zoo.delta(d).nbytes for s in chain.steps for d in s.deltas)
    return deltas + sum(zoo.component(s.component).nbytes for s in chain.steps)
