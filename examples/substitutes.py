"""What may replace what in the demo family: equivalent components, a stitch, a surrogate.

  python -m examples.substitutes equivalence --out DIR [--plot FILE]
  python -m examples.substitutes stitch --out DIR        # demo-1m's lower layers, demo-3m's upper ones
  python -m examples.substitutes stitch_back --out DIR   # the other way round
  python -m examples.substitutes confirm --out DIR       # both again, on data that decided nothing
  python -m examples.substitutes surrogate --out DIR

Each makes what it lacks under DIR (the family's zoo, texts and items of examples.probes), runs the
converter's command and prints a table in Markdown and the figures as JSON. Seeded; some minutes on two cores.
"""

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import app, flags

from checkpoints import approximate, equivalence
from checkpoints.probes import ProbeOptions, train_items
from checkpoints.probes import probe as held_out
from checkpoints.progress import Progress
from examples import demo_zoo, probes
from jblock.adapt import forward, stitching, training, training_state
from jblock.adapt.forward import Weights
from jblock.adapt.metrics import Evaluator
from jblock.adapt.probe import ProbeData, Rows
from jblock.blocks.spec import AttentionSpec
from jblock.zoo.acceptance import AcceptancePolicy
from jblock.zoo.records import Chain, Step
from jblock.zoo.store import Zoo

_OUT = flags.DEFINE_string("out", None, "Folder to work in; made when absent.", required=True)
_PLOT = flags.DEFINE_string("plot", None, "Draw cosine against damage to this file.")
_TUNES = {
    "demo-3m-sort": "sort",
    "demo-3m-find": "find",
    "demo-3m-date": "date",
    "demo-1m-upper": "upper",
    "demo-1m-spell": "spell",
}
_RETRAINED = {"demo-3m-sort": 4, "demo-1m-upper": 2}  # name -> first layer that is trained on
_TURNS = 24  # of decode steps of either side, by turns
_WORST = -0.005  # accuracy change that is accepted, by the lower end of its interval


def prepare(out: pathlib.Path) -> Zoo:
    """The family in a zoo, and the files to measure on, unless they are there."""
    files, folder = out / "probes", out / "zoo"
    if not (files / "facts-further.jsonl").exists():
        probes.write(files)
    if not (folder / "zoo.json").exists():
        demo_zoo.convert(demo_zoo.with_bases(demo_zoo.load_family(())), folder)
    return Zoo.open(folder)


def retrain(zoo: Zoo, name: str, new: str, first: int, items: pathlib.Path) -> Chain:
    """A later version of a fine-tune: its own layers trained on for some steps, as a model of its own."""
    chain = zoo.chain(name)
    begin, end = stitching.layer_starts(zoo, chain)[first], len(chain.steps) - 2
    rows = train_items(zoo, chain, items)
    whole = forward.load(zoo, chain.steps)
    schedule = training.Schedule(steps=40, learning_rate=1e-4, batch_tokens=1280, seed=1)
    work = training.key(name, new, dataclasses.asdict(schedule), rows)

    @jax.jit
    def loss_and_gradient(trained: Any, fixed: Any, tokens: jax.Array, target: jax.Array):
        def loss(trained: Any) -> jax.Array:
            by = Weights(whole.specs[begin:end], trained)
            weights = Weights(whole.specs, fixed).replaced(begin, end - begin, by)
            _, logits = forward.hidden_and_logits(weights, tokens)
            return training.cross_entropy(logits, tokens, target)

        return jax.value_and_grad(loss)(trained)

    trained = training.fit(
        work,
        lambda now, step: loss_and_gradient(
            now, whole.tensors, *training.batch([rows], schedule, step)
        ),
        whole.tensors[begin:end],
        schedule,
    )
    steps = list(chain.steps)
    for at, tensors in zip(range(begin, end), trained, strict=True):
        id_ = zoo.put_component(whole.specs[at], training.stored(tensors, "bfloat16"))
        steps[at] = Step(component=id_)
    training_state.remove(work)
    made = dataclasses.replace(chain, name=new, version=0, steps=tuple(steps), source_files=None)
    return zoo.publish(made)


def equivalents(
    out: pathlib.Path, plot: pathlib.Path | None, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Cosine against measured damage, the recommended substitutions, and what they cost and gain; of some of
    the fine-tunes, or of all."""
    zoo, files = prepare(out), out / "probes"
    tunes = dict(_TUNES)
    for name, first in _RETRAINED.items():
        tunes[f"{name}-v2"] = _TUNES[name]
        if f"{name}-v2" not in zoo.chains():
            retrain(zoo, name, f"{name}-v2", first, files / "train" / f"{_TUNES[name]}.jsonl")
    options = equivalence.Options(
        names=list(names or tunes),
        cosine=0.8,
        probe=ProbeOptions(
            text=files / "held-out.txt",
            items=[f"{name}={files}/items/{tunes[name]}.jsonl" for name in (names or tunes)],
            tokens=16384,
        ),
        accepted=AcceptancePolicy(policy="near", thresholds={"accuracy_change": _WORST}),
        suffix=".near",
    )
    data = equivalence.run(zoo, options, Progress())
    print("| model | step | cosine | hidden error | KL | top-1 | accuracy change, points |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    points = []
    compared = [e for e in data["edges"] if "parameter_cosine" in e["scores"]]
    for edge in sorted(compared, key=lambda e: -e["scores"]["parameter_cosine"]["value"]):
        chain = zoo.chain(*_split(edge["chain"]))
        scores = {n: s["value"] for n, s in edge["scores"].items()}
        change = edge["scores"]["accuracy_change"]
        kind = _place(zoo, chain, edge)
        print(
            f"| {chain.name} | {kind} | {scores['parameter_cosine']:.4f} | {scores['hidden_error']:.3f} "
            f"| {scores['kl']:.4f} | {scores['top1_agreement']:.3f} | {_percent(change)} |"
        )
        points.append((scores["parameter_cosine"], -change["value"], kind.split()[0]))
    print()
    for row in data["recommended"]:
        count = row["of"] if row["steps"] is None else len(row["steps"])
        print(f"{row['chain']}: {count} steps of {row['of']} replaced", end=", ")
        print(f"accuracy {_percent(row['scores']['accuracy_change'])} of {row['accuracy']:.4f}")
    data["serving"] = serving(zoo, data, out)
    if plot is not None:
        draw(points, plot)
    return data


def serving(zoo: Zoo, data: Mapping[str, Any], out: pathlib.Path) -> dict[str, Any]:
    """The recommended chains and the models they come from in one engine each: bytes and decode steps."""
    from bench.stepper import Stepper
    from jblock.engine.config import EngineConfig

    replaced = {row["chain"].partition("@")[0]: row["published"] for row in data["recommended"]}
    names = sorted({*_TUNES, *replaced})
    sides = {
        "exact": {n: zoo.chain(n) for n in names},
        "near": {n: zoo.chain(*_split(replaced.get(n, n))) for n in names},
    }
    config = EngineConfig(
        max_num_seqs=4 * len(names),
        max_model_len=128,
        page_size=64,
        decode_sizes=(4, 8, 16, 32),
        prefill_grids=((8, 16),),
        kv_memory_mb=64,
    )
    rows = 4 * len(names)
    steppers = {s: Stepper(zoo, c, config, out / "programs") for s, c in sides.items()}
    for stepper in steppers.values():
        stepper.fill(names * 4, 8, 110)
    times: dict[str, list[float]] = {"exact": [], "near": []}
    for turn in range(_TURNS):
        for side in ("exact", "near") if turn % 2 else ("near", "exact"):
            times[side].append(steppers[side].steps(4, rows) / 4)
    result: dict[str, Any] = {"models": len(names), "rows": rows}
    for side, chains in sides.items():
        used = {s.component for c in chains.values() for s in c.steps}
        seconds = statistics.median(times[side])
        result[side] = {
            "weight_bytes": sum(zoo.component(i).nbytes for i in used),
            "blocks": len(steppers[side].graph.instances),
            "step_ms": round(1e3 * seconds, 3),
            "tokens_per_second": round(rows / seconds),
        }
    ratios = sorted(n / e for n, e in zip(times["near"], times["exact"], strict=True))
    # An interval of the median that needs no distribution: 95% of it lies between these ranks.
    rank = int(_TURNS / 2 - 0.98 * _TURNS**0.5)
    result["step_ratio"] = {
        "value": round(statistics.median(ratios), 3),
        "low": round(ratios[rank - 1], 3),
        "high": round(ratios[-rank], 3),
    }
    return result


def draw(points: list[tuple[float, float, str]], path: pathlib.Path) -> None:
    """Cosine against accuracy lost. Needs matplotlib (extra: plot)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, marker in {"attention": "o", "ffn": "s", "run": "^", "other": "x"}.items():
        chosen = [(c, 100 * d) for c, d, k in points if k == kind]
        if chosen:
            xs, ys = zip(*chosen, strict=True)
            axes.plot(xs, ys, marker, label=kind, alpha=0.7)
    axes.axhline(0.5, color="gray", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=0.5)
    axes.set_xlabel("cosine of the parameters")
    axes.set_ylabel("accuracy lost, points")
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def stitched(
    out: pathlib.Path, lower: str, upper: str, joins: list[str], steps: int
) -> dict[str, Any]:
    """Lower layers of one base under upper layers of the other, at two depths, by one stitch."""
    zoo, files = prepare(out), out / "probes"
    data = approximate.stitch(
        zoo,
        lower,
        upper,
        joins,
        f"{lower}-under-{upper.removeprefix('demo-')}",
        _data(files, "train-mostly-text.txt", files / "facts.jsonl", None, 65536),
        training.Schedule(steps=steps, learning_rate=3e-3, batch_tokens=1024, seed=0),
        768,
        Progress(),
    )
    _table([*data["parents"], *data["models"]])
    return data


def confirm(out: pathlib.Path) -> dict[str, Any]:
    """Every stitched chain that was made, on what nobody looked at while cuts and steps were chosen: text
    behind the first 16,384 tokens, and other facts."""
    zoo, files = prepare(out), out / "probes"
    facts = files / "facts-further.jsonl"
    options = ProbeOptions(text=files / "held-out.txt", items=[str(facts)], tokens=65536)
    data = held_out(zoo, zoo.chain("demo-3m"), options)
    first = 16384 // data.text.tokens.shape[1]
    text = Rows(data.text.tokens[first:], data.text.target[first:])
    data = ProbeData(data.name, text, data.items)
    evaluator = Evaluator(zoo, zoo.chain("demo-1m").steps, data)
    rows: list[dict[str, Any]] = []
    for name in ["demo-1m", "demo-3m", *(n for n in zoo.chains() if "-under-" in n)]:
        (beside,) = evaluator.measure([zoo.chain(name).steps])
        found = beside.substitute
        scores = {n: dataclasses.asdict(s) for n, s in beside.scores().items()}
        row = {"name": name, "perplexity": found.perplexity, "accuracy": found.accuracy}
        rows.append(row | {"beside": {"demo-1m": scores}})
    _table(rows)
    return {"models": rows}


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    print(
        "| model | perplexity of text | beside demo-1m | accuracy on facts | beside demo-1m, points |"
    )
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        found = row.get("beside", {}).get("demo-1m")
        text = _percent(found["perplexity_change"]) if found else ""
        change = _percent(found["accuracy_change"]) if found else ""
        print(
            f"| {row['name']} | {row['perplexity']:.2f} | {text} | {row['accuracy']:.4f} | {change} |"
        )


def surrogate(out: pathlib.Path) -> dict[str, Any]:
    """The two layers that a fine-tune trained, at under half of their parameters."""
    zoo, files = prepare(out), out / "probes"
    data = approximate.surrogate(
        zoo,
        "demo-3m-sort",
        "4:6",
        0.45,
        "demo-3m-sort-small",
        _data(files, "train.txt", files / "items" / "sort.jsonl", files / "train" / "sort.jsonl"),
        training.Schedule(steps=400, learning_rate=3e-3, batch_tokens=1024, seed=0),
        Progress(),
    )
    print("| model | perplexity of text | accuracy |\n| --- | --- | --- |")
    for row in (*data["parents"], *data["models"]):
        print(f"| {row['name']} | {row['perplexity']:.3f} | {row['accuracy']:.4f} |")
    return data


def _data(
    files: pathlib.Path,
    text: str,
    items: pathlib.Path,
    trained: pathlib.Path | None,
    tokens: int = 16384,
) -> approximate.Data:
    return approximate.Data(
        train=files / text,
        train_items=trained,
        probe=ProbeOptions(text=files / "held-out.txt", items=[str(items)], tokens=tokens),
    )


def _split(text: str) -> tuple[str, int | None]:
    name, _, version = text.partition("@")
    return name, int(version) if version else None


def _place(zoo: Zoo, chain: Chain, edge: Mapping[str, Any]) -> str:
    """What an edge replaces: "attention 4", or "run" of neighbors, with the layers."""
    ids = [s["component"] for s in edge["original"]]
    at = [s.component for s in chain.steps].index(ids[0])
    specs = [zoo.component(s.component).spec for s in chain.steps[: at + len(ids)]]
    layers = [
        sum(isinstance(s, AttentionSpec) for s in specs[: i + 1]) - 1 for i in range(len(specs))
    ]
    if len(ids) > 1:
        return f"run of layers {layers[at]} to {layers[-1]}"
    kind = specs[at].kind
    return f"{kind} {layers[at]}" if kind in ("attention", "ffn") else f"other {kind}"


def _percent(change: Mapping[str, float]) -> str:
    """Hundredths, with their interval."""
    return f"{100 * change['value']:.2f} ({100 * change['low']:.2f} to {100 * change['high']:.2f})"


def main(argv: list[str]) -> None:
    """Runs what is asked for."""
    out = pathlib.Path(_OUT.value)
    plot = pathlib.Path(_PLOT.value) if _PLOT.value else None
    wanted = {
        "equivalence": lambda: equivalents(out, plot),
        "stitch": lambda: stitched(out, "demo-1m", "demo-3m", ["1:1", "2:1"], 1000),
        "stitch_back": lambda: stitched(out, "demo-3m", "demo-1m", ["4:1", "5:1"], 1500),
        "confirm": lambda: confirm(out),
        "surrogate": lambda: surrogate(out),
    }
    if len(argv) != 2 or argv[1] not in wanted:
        raise app.UsageError(f"name one of {', '.join(wanted)}")
    out.mkdir(parents=True, exist_ok=True)
    data = wanted[argv[1]]()
    (out / f"{argv[1]}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
