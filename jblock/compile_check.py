"""`python -m jblock.compile_check`: does every program compile for every accelerator, and fit it?

Compiles the programs of real models' blocks and of the kernels for TPUs and GPUs that are not there, with
their real compilers, and holds each whole model's memory against the chips' (table: `compile_matrix.py`).
`--write PAGE` puts the results into a page between its marks; with `--only` it replaces those targets' rows.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags, logging

from jblock import compile_matrix as matrix
from jblock.compile_matrix import Checker, Result
from jblock.parallel.targets import GIB, Target

_QUICK = flags.DEFINE_bool("quick", False, "A spread of the matrix, as in make test.")
_ONLY = flags.DEFINE_list("only", None, "Targets to check; default: all.")
_JSON = flags.DEFINE_string("json", None, "Where to write the results as JSON.")
_WRITE = flags.DEFINE_string("write", None, "Page whose table is replaced by the results.")
_MARKS = "<!-- compile_check -->\n", "<!-- end -->\n"
_HEAD = "| model or op | weights | target | programs | code MiB | weights GiB | KV GiB | temporary GiB | |"


def run(targets: Sequence[str], quick: bool) -> list[Result]:
    """Checks the matrix, one target after the other.

    Raises:
      ValueError: a target's compiler is not installed.
    """
    results: list[Result] = []
    cases = matrix.QUICK if quick else matrix.CASES
    for name in targets:
        with Checker(Target.parse(name)) as checker:
            queued = [checker.model(*case[:2]) for case in cases if case[2] == name]
            if name in (matrix.QUICK_KERNELS if quick else matrix.KERNEL_TARGETS):
                for op in matrix.ops(checker.target):
                    models = matrix.KERNEL_TARGETS[name]
                    queued.append(checker.kernels(op, models, most=1 if quick else None))
            for result in queued:
                results.append(result())
                print(_line(results[-1]), f"{results[-1].compile_seconds} s", file=sys.stderr)
                for failure in results[-1].failures:
                    print(f"  FAILED {failure}", file=sys.stderr)
    return results


def _line(result: Result) -> str:
    gib = [f"{b / GIB:.2f}" for b in (result.weight_bytes, result.kv_bytes)]
    if not result.dtype:
        gib = ["", ""]
    verdict = "fits" if result.fits else "refused"
    if not result.dtype:
        verdict = "compiles"
    if not result.as_expected:
        verdict = (
            f"{len(result.failures)} FAILED" if result.failures else f"{verdict}, NOT EXPECTED"
        )
    cells = (
        *(result.model, result.dtype, result.target, str(result.programs)),
        *(f"{result.code_bytes / 2**20:.1f}", *gib, f"{result.temp_bytes / GIB:.2f}", verdict),
    )
    return f"| {' | '.join(cells)} |"


def _write(page: Path, results: Sequence[Result]) -> None:
    """Replaces the rows of the targets checked, and keeps the others in the matrix's order."""
    before, _, rest = page.read_text().partition(_MARKS[0])
    old, _, after = rest.partition(_MARKS[1])
    rows: dict[str, list[str]] = {name: [] for name in matrix.TARGETS}
    for line in old.splitlines():
        cells = [c.strip() for c in line.split("|")]
        if len(cells) > 3 and cells[3] in rows:
            rows[cells[3]].append(line)
    for name in {r.target for r in results}:
        rows[name] = [_line(r) for r in results if r.target == name]
    table = [_HEAD, "|---|---|---|---:|---:|---:|---:|---:|---|"]
    table += [line for lines in rows.values() for line in lines]
    page.write_text(before + _MARKS[0] + "\n".join(table) + "\n" + _MARKS[1] + after)


def main(argv: Sequence[str]) -> int:
    """Returns 1 if a program does not compile, or a model fits that should not or the other way round; 2 if
    a compiler is missing."""
    del argv
    # It compiles, and never computes: an accelerator of this machine is left to others, its library unasked.
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)  # no kernel is tuned for a chip that nobody has
    names: tuple[str, ...] = matrix.TARGETS
    if _QUICK.value:
        names = tuple(dict.fromkeys((*(c[2] for c in matrix.QUICK), *matrix.QUICK_KERNELS)))
    began = time.monotonic()
    try:
        results = run([n for n in names if not _ONLY.value or n in _ONLY.value], _QUICK.value)
    except ValueError as e:
        print(f"compile_check: {e}", file=sys.stderr)
        return 2
    print(f"{len(results)} cases in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if _JSON.value:
        data = {"jax": jax.__version__, "results": [dataclasses.asdict(r) for r in results]}
        Path(_JSON.value).write_text(json.dumps(data, indent=1) + "\n")
    if _WRITE.value:
        _write(Path(_WRITE.value), results)
    return int(not all(r.as_expected for r in results))


if __name__ == "__main__":
    app.run(main)
