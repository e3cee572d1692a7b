"""The documentation does what it says: marked commands run, flags exist, links lead somewhere.

A fenced block after `<!-- run -->` is executed, in the order of the page. One after
`<!-- run until "TEXT" -->` is started, and stays until the page ends, once it has printed TEXT.
"""

import dataclasses
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = PROJECT["scripts"]
PORT = 8470  # jblock-serve's own, which the pages use
START_SECONDS = 300

_FENCE = re.compile(r'(?:<!-- run(?: until "(.+?)")? -->\n)?^```(\w*)\n(.*?)^```$', re.M | re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMAND = re.compile(
    r"^(?:\.venv/bin/)?(jblock-\w+|jblock (?:convert|serve|client|compile)) ([^#\n]*)", re.M
)


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced block: its language, its text, whether it is run, and what to wait for."""

    language: str
    text: str
    runs: bool
    until: str | None


def fences(page: Path) -> list[Fence]:
    """All fenced blocks of a page."""
    return [
        Fence(m[2], m[3], m[0].startswith("<!-- run"), m[1])
        for m in _FENCE.finditer(page.read_text())
    ]


def names(paths: list[Path]) -> list[str]:
    """For test ids."""
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.fixture
def shell(tmp_path) -> dict[str, str]:
    """Environment with the console scripts of pyproject.toml on PATH, installed or not."""
    for name, target in SCRIPTS.items():
        module, function = target.split(":")
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!{sys.executable}\nfrom {module} import {function}\n{function}()\n")
        script.chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    path = f"{tmp_path / 'bin'}{os.pathsep}{Path(sys.executable).parent}"
    return {
        **os.environ,
        "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }


def command(fence: Fence) -> list[str]:
    """How a block is run."""
    if fence.language == "python":
        return [sys.executable, "-c", fence.text]
    return ["bash", "-euo", "pipefail", "-c", fence.text]


def started(fence: Fence, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A block in the background; it is waited for at the first `next` and stopped at the second."""
    log = folder / "background.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command(fence),
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while fence.until not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def page_with_commands(page: Path):
    """The README in `make test`, all others in `make test-long`: they train and compile."""
    return pytest.param(page, marks=[pytest.mark.long] * (page.name != "README.md"), id=page.name)


@pytest.mark.parametrize(
    "page", [page_with_commands(p) for p in PAGES if any(f.runs for f in fences(p))]
)
def test_the_marked_commands_of_a_page_work(page, tmp_path, shell):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT} is taken on this machine")
    background = []
    try:
        for fence in (f for f in fences(page) if f.runs):
            if fence.until:
                background.append(started(fence, tmp_path, shell))
                next(background[-1])
                continue
            done = subprocess.run(
                command(fence), cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{fence.text}\n{done.stdout}\n{done.stderr}"
            assert done.stdout.strip(), f"{fence.text} printed nothing"
    finally:
        for process in reversed(background):
            process.close()


@functools.cache
def helptext(tool: str, subcommand: str) -> str:
    """What a tool says of its flags."""
    tool = tool.replace(" ", "-")
    module, function = SCRIPTS[tool].split(":")
    code = f"import sys; sys.argv[0] = {tool!r}; from {module} import {function}; {function}()"
    arguments = (
        ["--helpfull"] if tool in ("jblock-serve", "jblock-compile") else [subcommand, "--help"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def commands(page: Path) -> list[tuple[str, str]]:
    """(tool, arguments) of every command line in the page's fenced blocks."""
    return [match.groups() for f in fences(page) for match in _COMMAND.finditer(f.text)]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_the_flags_in_commands_exist(page):
    for tool, arguments in commands(page):
        known = helptext(tool, next((a for a in arguments.split() if a.isalpha()), ""))
        for flag in re.findall(r"--(\w+)", arguments):
            assert re.search(rf"--(\[no-?\])?{flag}\b", known), (
                f"{page.name}: {tool} has no --{flag}"
            )


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    for link in _LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page.name} links to {link}; headings: {sorted(anchors)}"


def test_make_targets_in_the_readme_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M))
    assert named and named <= targets


def test_the_extras_in_the_readme_are_those_there_are():
    (text,) = re.findall(r"^- Extras: (.*?)^- ", (ROOT / "README.md").read_text(), re.M | re.S)
    assert set(re.findall(r"`(\w+)`", text)) == set(PROJECT["optional-dependencies"])
