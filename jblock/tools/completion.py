"""`jblock completion SHELL`: what bash, zsh and fish complete after `jblock` and the programs beside it.

The script is generated from the commands' own parsers and flags, and then needs no Python to complete.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator

from jblock.command import COMMANDS, program

_SHELLS = {
    "bash": 'eval "$(jblock completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(jblock completion zsh)"   # in ~/.zshrc',
    "fish": "jblock completion fish > ~/.config/fish/completions/jblock.fish",
}
# Command -> modules whose absl flags it has.
_FLAGS = {
    "serve": ("serving.main", "serving.engine_flags", "serving.agent_flags"),
    "compile": ("serving.compile_main", "serving.engine_flags"),
}


def words() -> dict[str, list[str]]:
    """What may follow: "" is `jblock` itself, "convert" a command, "convert hf" a command of that."""
    out = {"": [*COMMANDS, "--help", "--version"], "completion": list(_SHELLS)}
    # Parsers first: once a server's flags are defined, the client could not name its own the same.
    for name in sorted(COMMANDS, key=lambda n: n in _FLAGS):
        command = COMMANDS[name]
        module = importlib.import_module(command.module)
        if name in _FLAGS:
            from absl import flags

            by_module = flags.FLAGS.flags_by_module_dict()
            out[name] = sorted(f"--{f.name}" for m in _FLAGS[name] for f in by_module[m])
        elif hasattr(module, "parser"):
            out |= dict(_of_parser(name, module.parser(f"jblock {name}")))
    return out


def _of_parser(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found.append(name)
                yield from _of_parser(f"{path} {name}", sub)
        else:
            found += [o for o in action.option_strings if o.startswith("--")]
            found += [str(c) for c in action.choices or () if not action.option_strings]
    yield path, found


def bash(table: dict[str, list[str]]) -> str:
    """The script for bash. `jblock-serve` completes as `jblock serve`."""
    paths = "|".join(f'"{path}"' for path in table if path)
    cases = "\n".join(
        f'    "{path}") COMPREPLY=($(compgen -W "{" ".join(names)}" -- "$current"));;'
        for path, names in table.items()
    )
    programs = " ".join(
        f"jblock-{name}" for name in ("convert", "serve", "agent", "client", "compile")
    )
    return f"""\
_jblock() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} program=${{COMP_WORDS[0]##*/}} path= word i
  [[ $program == jblock-* ]] && path=${{program#jblock-}}
  for ((i = 1; i < COMP_CWORD; i++)); do
    word="${{path:+$path }}${{COMP_WORDS[i]}}"
    case "$word" in
      {paths}) path=$word;;
    esac
  done
  COMPREPLY=()
  case "$path" in
{cases}
  esac
}}
complete -o default -F _jblock jblock {programs}
"""


def zsh(table: dict[str, list[str]]) -> str:
    """The script for zsh, by way of its emulation of bash's."""
    return "autoload -U +X compinit bashcompinit\ncompinit\nbashcompinit\n" + bash(table)


def fish(table: dict[str, list[str]]) -> str:
    """The script for fish."""
    lines = [
        "function __jblock_at",
        "  set -l path",
        "  for word in (commandline -opc)[2..-1]",
        "    set -l next (string join ' ' $path $word)",
        f"    contains -- $next {' '.join(repr(path) for path in table if path)}; and set path $next",
        "  end",
        '  test "$path" = "$argv"',
        "end",
    ]
    for path, names in table.items():
        at = f"__jblock_at {path}".strip()
        plain = " ".join(n for n in names if not n.startswith("--"))
        if plain:
            lines.append(f"complete -c jblock -n '{at}' -a '{plain}'")
        lines += [
            f"complete -c jblock -n '{at}' -l {n.removeprefix('--')}"
            for n in names
            if n.startswith("--")
        ]
    return "\n".join(lines) + "\n"


def parser(name: str) -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog=name,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(_SHELLS.values()),
    )
    made.add_argument("shell", choices=list(_SHELLS))
    return made


def run() -> None:
    """Entry point of `jblock completion`."""
    args = parser(program(sys.argv[0], "jblock completion")).parse_args(sys.argv[1:])
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](words()), end="")
