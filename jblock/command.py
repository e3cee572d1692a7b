"""`jblock`: one command for all of them. `jblock serve` is what `jblock-serve` is, and so on.

A command's module is imported when it is named, so that none waits for what another needs.
"""

import importlib
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command: the module whose `run` is its entry point, and what it does in a line."""

    module: str
    help: str


COMMANDS = {
    "convert": Command("checkpoints.main", "fill a zoo with models, show, check and export them"),
    "serve": Command("serving.main", "serve the models of a zoo over gRPC"),
    "agent": Command("jblock.hosts.main", "compute for a server on another host"),
    "client": Command("serving.client_main", "ask a server"),
    "compile": Command("serving.compile_main", "build programs ahead, for devices not here too"),
    "placement": Command(
        "jblock.tools.placement", "where blocks would lie on several agents, and why"
    ),
    "bench": Command("bench.__main__", "measure this machine"),
    "doctor": Command("jblock.tools.doctor", "check environment, device, zoo, cache and ports"),
    "completion": Command("jblock.tools.completion", "print a shell's completion script"),
}


def program(argv0: str, otherwise: str) -> str:
    """What a command is called in its help and errors: as it was started, or `otherwise` where a module of it
    was started."""
    name = os.path.basename(argv0)
    return name if name.startswith("jblock") else otherwise


def own_version() -> str:
    """jblock's version."""
    try:
        return importlib.metadata.version("jblock")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def version() -> str:
    """One line: jblock's version, and those that decide what it computes."""
    own = own_version()
    jax, jaxlib = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    return f"jblock {own} (jax {jax}, jaxlib {jaxlib}, Python {platform.python_version()})"


def usage() -> str:
    """What `jblock --help` prints."""
    lines = (f"  {name:<11} {command.help}" for name, command in COMMANDS.items())
    return "\n".join(
        (
            "usage: jblock COMMAND [ARGUMENT ...]",
            "",
            "Serves many fine-tuned language models from one pool by sharing their blocks.",
            "",
            *lines,
            "",
            "`jblock COMMAND --help` tells more, `jblock --version` the version. Some are also programs:",
            "jblock-convert, jblock-serve, jblock-agent, jblock-client, jblock-compile.",
        )
    )


def main(argv: list[str]) -> int:
    """Runs `jblock argv[1:]`; a command ends the process itself.

    Returns:
      0 for help and the version, 2 for a command that is not known.
    """
    given = argv[1:2]
    if given in (["--version"], ["version"]):
        print(version())
        return 0
    if given in ([], ["--help"], ["-h"], ["--helpshort"], ["help"]):
        print(usage(), file=sys.stdout if given else sys.stderr)
        return 0 if given else 2
    name = given[0]
    if name not in COMMANDS:
        print(f"jblock: no command {name!r}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # The command reads its arguments from here, as it does when it is started alone.
    sys.argv = [f"jblock {name}", *argv[2:]]
    importlib.import_module(COMMANDS[name].module).run()
    return 0


def run() -> None:
    """Entry point of `jblock`."""
    sys.exit(main(sys.argv))
