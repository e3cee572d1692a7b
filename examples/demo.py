"""A family of small fine-tuned models on one server, each answer held against transformers'.

  make demo                                  # all of it; ends with one line of JSON
  python -m examples.demo --models=demo-1m-add,demo-1m-copy-lora4 --requests=40
  make serve                                 # only serve the family, on port 8470, until Ctrl-C

Exit codes: 0 every request was answered as transformers answers it, 1 something was not,
2 the demo could not run, 130 Ctrl-C (128 + the signal that ended it).
"""

import asyncio
import json
import os
import pathlib
import signal
import sys
import time

from absl import app, flags
from rich.console import Console
from rich.progress import Progress

from checkpoints.printing import size
from examples import demo_load, demo_reference, demo_report, demo_server, demo_zoo
from examples.demo_reference import DemoError
from serving.client import Client

_MODELS = flags.DEFINE_list("models", [], "Names in family.json to serve; all when empty.")
_REQUESTS = flags.DEFINE_integer("requests", None, "Most requests; default: the whole reference.")
_STREAMS = flags.DEFINE_integer("streams", 24, "Requests in flight at once.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", "demo-run", "Where the zoo and the server's log go.")
_REFERENCE = flags.DEFINE_string(
    "reference", str(demo_zoo.ROOT / "reference.json"), "What transformers answered."
)
_SERVE_ONLY = flags.DEFINE_bool("serve_only", False, "Serve the family until Ctrl-C.")
_PORT = flags.DEFINE_integer("port", 8470, "Port of --serve_only.")


def run(console: Console) -> int:
    """The demo; returns its exit code."""
    family = demo_zoo.load_family(_MODELS.value)
    names = list(family)
    folder = pathlib.Path(_FOLDER.value)
    zoo = folder / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    reference = demo_reference.load(pathlib.Path(_REFERENCE.value))
    items = demo_load.shuffled([i for i in reference if i.model in family], _REQUESTS.value)

    console.print(f"[bold]1. Converting[/] {len(names)} models and adapters into {zoo}")
    begin = time.monotonic()
    _convert(family, zoo, console)
    totals = demo_zoo.zoo_totals(zoo, names)
    demo_zoo.check_prompts(zoo, items)
    console.print(
        f"   {size(totals['stored_bytes'])} stored for {size(totals['logical_bytes'])} of models, "
        f"{time.monotonic() - begin:.0f} s",
        highlight=False,
    )

    console.print(
        f"[bold]2. Starting[/] jblock-serve, which compiles its first programs; log: "
        f"{folder / 'server.log'}"
    )
    begin = time.monotonic()
    with demo_server.start(zoo, names, folder / "server.log") as server:
        with console.status("compiling, half a minute on two cores"):
            server.wait_until_ready()
        warm_up_seconds = time.monotonic() - begin
        console.print(f"   listening on {server.target}, {warm_up_seconds:.0f} s", highlight=False)

        console.print(
            f"[bold]3. Asking[/] {len(items)} questions of {len(names)} models, "
            f"{_STREAMS.value} at a time"
        )
        before = server.counters()
        with _bar(console) as bar:
            task = bar.add_task("asking", total=len(items))
            answers, seconds = asyncio.run(
                demo_load.ask_all(server.target, items, _STREAMS.value, lambda: bar.advance(task))
            )
        after = server.counters()
        with Client(server.target, timeout=30) as client:
            models = client.models()

    result = demo_report.Run(
        family=demo_zoo.load_family(()),
        models=models,
        answers=answers,
        seconds=seconds,
        warm_up_seconds=warm_up_seconds,
        totals=totals,
        counters={name: after[name] - before.get(name, 0) for name in after},
    )
    demo_report.show(result, console)
    numbers = demo_report.summary(result)
    print(json.dumps(numbers), flush=True)
    return 1 if numbers["failed"] or numbers["mismatched"] else 0


def serve(console: Console) -> int:
    """Converts, then becomes the server; returns only if it cannot."""
    family = demo_zoo.load_family(_MODELS.value)
    zoo = pathlib.Path(_FOLDER.value) / "zoo"
    zoo.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"Converting {len(family)} models and adapters into {zoo}")
    _convert(family, zoo, console)
    entry = next((e for e in family.values() if "example" in e), None)
    name, prompt = (
        (entry["name"], entry["example"]["prompt"]) if entry else (next(iter(family)), "a")
    )
    console.print(
        "Starting the server. It compiles for up to a minute; once it says that it serves, ask it "
        "from another terminal:\n"
        "  .venv/bin/jblock-client models\n"
        f"  .venv/bin/jblock-client generate --model {name} --prompt {prompt!r}\n"
        "Ctrl-C ends it.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    sys.stdout.flush()
    command = demo_server.command(zoo, list(family), f"--port={_PORT.value}")
    os.execv(command[0], command)


def _convert(family: dict, zoo: pathlib.Path, console: Console) -> None:
    entries = demo_zoo.with_bases(family)
    with _bar(console) as bar:
        task = bar.add_task("converting", total=len(entries))
        demo_zoo.convert(entries, zoo, lambda: bar.advance(task))


def _bar(console: Console) -> Progress:
    """Bars on a terminal; a log gets no bars."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def main(argv: list[str]) -> int:
    """Runs the demo, or the server; see the module for exit codes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    # A log is no terminal, and rich would break the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 110)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        return serve(console) if _SERVE_ONLY.value else run(console)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def _end(number: int, _frame: object) -> None:
    """Ends the demo upon a signal, right here: an exception out of a signal's handler is lost where
    it meets one of grpc's callbacks, or a library's bare `except:`, and the demo would go on."""
    demo_server.stop_all()
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")  # The cursor, which bars hide.
    name = signal.Signals(number).name
    os.write(2, f"demo: stopped by {name}; the server is gone too\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    app.run(main)
