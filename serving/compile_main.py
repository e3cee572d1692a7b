"""`jblock-compile`: builds the programs a server will need, for devices that need not be here."""

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from absl import app, flags

from serving.engine_flags import command_line, engine_kwargs

if TYPE_CHECKING:
    from jblock.tools.prebuild import Report

_TARGET = flags.DEFINE_string(
    "target",
    None,
    "All the chips of the host that will serve: tpu:v5e:2x2, cuda:h200, cuda:h200:4 or cpu.",
    required=True,
)
_JSON = flags.DEFINE_string("json", None, "Where to write the report as JSON.")


def build(target: str, kwargs: dict[str, Any]) -> "Report":
    """Builds what `jblock-serve` with these arguments needs on a target."""
    from jblock.blocks.platform import Platform
    from jblock.engine.factory import cache_folder, served_chains
    from jblock.engine.platform_defaults import default_backend, engine_config
    from jblock.pallas_kernels import backends
    from jblock.parallel.targets import Target
    from jblock.tools.prebuild import prebuild
    from jblock.zoo.store import Zoo

    settings = dict(kwargs)
    store = Zoo.open(settings.pop("zoo"), verify=settings.pop("verify", "once"))
    models = settings.pop("models", ())
    folder = cache_folder(store, settings.pop("executable_cache", ""))
    named, where = settings.pop("backend", ""), Target.parse(target)
    platform = Platform.of(where.devices()[0])
    config = engine_config(settings, platform)
    if backend := named or default_backend(platform, config.kv_dtype):
        backends.serve(platform.name, backend)
    chains = served_chains(store, models, config)
    return prebuild(store, chains, config, where, folder, _progress)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} programs", end="" if done < total else "\n", file=sys.stderr)


def show(report: "Report", kwargs: dict[str, Any]) -> str:
    """The report for people."""
    mb = 10**6
    arguments = dict(kwargs)
    if report.config.kv_memory_mb:
        arguments["kv_memory_mb"] = report.config.kv_memory_mb
    memory = (
        f"weights {report.weight_bytes / mb:.0f}, adapter tables {report.table_bytes / mb:.0f}, KV "
        f"{report.kv_bytes / mb:.0f}; and {report.workspace_bytes / mb:.0f} of workspace on each chip"
    )
    lines = [
        f"{report.target}: {report.programs} programs, {report.compiled} compiled, the others were there; "
        f"{report.code_bytes / mb:.1f} MB of code",
        f"MB on all chips together: {memory}. It {'fits' if report.fits else 'DOES NOT FIT'}.",
        "",
        "Decoding, at least (an estimate by bandwidth and FLOPs of the chip, not measured):",
        "batch  cached tokens  weights MB   KV MB   GFLOP  step ms  tokens/s",
    ]
    for e in report.estimates:
        lines.append(
            f"{e.batch:5}  {e.context:13}  {e.weight_bytes / mb:10.1f}  {e.kv_bytes / mb:6.1f}  "
            f"{e.flops / 1e9:6.2f}  {e.seconds * 1e3:7.3f}  {e.tokens_per_second:8.0f}"
        )
    lines += ["", "Serve with:", f"  jblock-serve {command_line(arguments)}"]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 if the programs do not fit the target's memory, 2 on bad input."""
    try:
        if len(argv) > 1:
            raise ValueError(f"arguments: {argv[1:]} are not understood; all options are flags")
        kwargs = engine_kwargs()
        report = build(_TARGET.value, kwargs)
        if _JSON.value:
            data = dataclasses.asdict(report)
            with open(_JSON.value, "w") as file:
                json.dump(data, file, indent=1)
                file.write("\n")
        print(show(report, kwargs), flush=True)
        return int(not report.fits)
    except (ValueError, OSError) as error:
        print(f"jblock-compile: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"jblock-compile: {error}; --help lists the flags", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Entry point of `jblock-compile`."""
    # It compiles, and never computes: an accelerator of this machine is left to others.
    os.environ["JAX_PLATFORMS"] = "cpu"
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    run()
