"""`jblock`: one command for all; its version, completion and doctor."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jblock import command
from jblock.tools import completion, doctor

ROOT = Path(__file__).parent.parent


def test_help_and_version(capsys):
    assert command.main(["jblock", "--version"]) == 0
    assert capsys.readouterr().out.startswith("jblock ")
    assert command.main(["jblock", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in command.COMMANDS)
    assert command.main(["jblock"]) == 2
    assert command.main(["jblock", "frobnicate"]) == 2
    assert "frobnicate" in capsys.readouterr().err


def test_a_command_runs_under_its_name(tmp_path):
    """Errors and help call it what it was called."""
    run = [sys.executable, "-m", "jblock"]
    done = subprocess.run(
        [*run, "convert", "list", "--zoo", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("jblock convert: error: ")
    done = subprocess.run(
        [*run, "convert", "hf", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "jblock convert hf ./llama-3.2-1b" in done.stdout


def test_old_names_stay():
    assert command.program("/usr/bin/jblock-convert", "other") == "jblock-convert"
    assert command.program("jblock convert", "other") == "jblock convert"
    assert command.program("/x/checkpoints/main.py", "jblock-convert") == "jblock-convert"


@pytest.fixture(scope="module", autouse=True)
def table(tmp_path_factory):
    """The words, of a process of its own: in this one the flags of all commands would stay defined.

    It finds only what is installed, as where nobody has the repository.
    """
    installed = tmp_path_factory.mktemp("installed")
    for package in ("jblock", "serving", "checkpoints", "bench"):
        (installed / package).symlink_to(ROOT / package)
    code = "import json; from jblock.tools import completion; print(json.dumps(completion.words()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, check=True
    )
    words = json.loads(done.stdout.splitlines()[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "words", lambda: words)
        yield words


def test_words_are_those_of_the_commands(table):
    assert set(command.COMMANDS) <= set(table[""])
    assert {"hf", "gguf", "orbax", "peft", "list"} <= set(table["convert"])
    assert {"--zoo", "--name", "--dry_run"} <= set(table["convert gguf"])
    assert {"--zoo", "--port", "--mesh"} <= set(table["serve"])
    assert {"generate", "models"} <= set(table["client"])
    assert {"hf", "orbax"} <= set(table["convert export"]) or "--format" in table["convert export"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["jblock", "con"], ["convert"]),
        (["jblock", "convert", "gg"], ["gguf"]),
        (["jblock", "convert", "gguf", "file", "--dry"], ["--dry_run"]),
        (["jblock-convert", "ins"], ["inspect"]),
        (["jblock", "serve", "--metrics_p"], ["--metrics_port"]),
    ],
)
def test_bash_completes(table, typed, offered):
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    words = " ".join(f"'{w}'" for w in typed)
    script = completion.bash(table) + (
        f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _jblock; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered


def test_other_shells_get_a_script(table):
    assert "bashcompinit" in completion.zsh(table)
    assert "complete -c jblock" in completion.fish(table)


def test_doctor_finds_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "device", lambda: iter(()))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = ["--zoo", str(tmp_path / "nowhere"), "--port", str(port)]
        found = doctor.examine(doctor.parser("jblock doctor").parse_args(argv))
    wrong = {f.about: f.text for f in found if f.state == "wrong"}
    assert wrong.keys() == {"zoo", "ports"}
    assert "not a zoo" in wrong["zoo"]
    assert str(port) in wrong["ports"]
    (tmp_path / "cache" / "jblock").chmod(0o777)
    assert [f.state for f in doctor.cache()] == ["wrong"]


def test_doctor_says_what_computes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["jblock doctor", "--json", "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        doctor.run()
    data = json.loads(capsys.readouterr().out)
    assert (ended.value.code, data["wrong"]) == (0, 0)
    device = [f["text"] for f in data["findings"] if f["about"] == "device"]
    assert "cpu" in device[0]
