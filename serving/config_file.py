"""`--config FILE`: flags of a server in a TOML file, by their names. The command line overrides it."""

import tomllib
from collections.abc import Sequence
from typing import Any

from absl import flags

_FLAG = "config"


def expanded(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """The command line, program name first, with what the file that it names says before its own flags.

    Raises:
      ValueError: the file cannot be read, or has something that is no option.
    """
    path = _named(argv)
    if path is None:
        return list(argv)
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"config: {path} cannot be read: {error}") from error
    known = options(values)
    given = []
    for name, value in content.items():
        if name not in known or name == _FLAG:
            raise ValueError(
                f"config: {path}: {name!r} is no option; write one of {', '.join(sorted(known - {_FLAG}))}"
            )
        given.append(_flag(path, name, value, values))
    return [argv[0], *given, *argv[1:]]


def options(values: flags.FlagValues) -> set[str]:
    """The names of the server's own options."""
    modules = values.flags_by_module_dict()
    return {f.name for name, found in modules.items() if _is_ours(name) for f in found}


def listed(values: flags.FlagValues) -> str:
    """Every option that has a value, as a file would say it."""
    lines = []
    for name in sorted(options(values) - {_FLAG}):
        value = values[name].value
        if value is None:
            continue
        text = f"[{', '.join(map(_quoted, value))}]" if isinstance(value, list) else _quoted(value)
        lines.append(f"{name} = {text}")
    return "\n".join(lines)


def _is_ours(module: str) -> bool:
    return module.startswith("serving.") or module.endswith(("serving/main.py", "jblock-serve"))


def _named(argv: Sequence[str]) -> str | None:
    """The last file that the command line names."""
    path = None
    for at, word in enumerate(argv):
        name, found, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == _FLAG:
            path = value if found else (argv[at + 1] if at + 1 < len(argv) else None)
    return path


def _flag(path: str, name: str, value: Any, values: flags.FlagValues) -> str:
    """One option as the command line has it."""
    if isinstance(value, bool):
        if not values[name].boolean:
            raise ValueError(f"config: {path}: {name}: {value} is no value of it; leave true out")
        return f"--{name}" if value else f"--no{name}"
    if isinstance(value, list) and all(isinstance(item, str) and "," not in item for item in value):
        return f"--{name}={','.join(value)}"
    if isinstance(value, str | int | float):
        return f"--{name}={value}"
    raise ValueError(
        f"config: {path}: {name}: is neither a number, a text, true, false, nor a list of texts"
    )


def _quoted(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
