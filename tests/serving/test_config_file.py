"""Flags in a file: checked by name and value, and overridden by those of the command line."""

import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import serving.main  # noqa: F401 (defines the flags)
from serving import config_file

ROOT = Path(__file__).parents[2]


def expanded(folder: Path, text: str, *more: str) -> list[str]:
    (folder / "jblock.toml").write_text(text)
    argv = ["jblock-serve", f"--config={folder / 'jblock.toml'}", *more]
    return config_file.expanded(argv, flags.FLAGS)


def test_what_a_file_says_stands_before_the_command_line(tmp_path):
    text = 'zoo = "/zoo"\nport = 9000\nmodels = ["a", "b"]\nopen_health = true\nshare = false\n'
    found = expanded(tmp_path, text, "--port=1")
    assert found[1:6] == ["--zoo=/zoo", "--port=9000", "--models=a,b", "--open_health", "--noshare"]
    assert found[-1] == "--port=1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 9000", "'prot' is no option"),
        ("port = [1]", "port: is neither a number"),
        ("port = true", "port: True is no value of it"),
        ("port = ", "cannot be read"),
        ("verbosity = 1", "'verbosity' is no option"),
        ('config = "x"', "'config' is no option"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        expanded(tmp_path, text)


def test_a_value_that_does_not_fit_ends_the_server(tmp_path):
    (tmp_path / "jblock.toml").write_text('zoo = "/none"\nport = "many"\n')
    command = [sys.executable, "-m", "serving.main", "--config", str(tmp_path / "jblock.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert "port" in done.stderr and "Traceback" not in done.stderr


def test_what_is_in_force_is_printed(tmp_path):
    (tmp_path / "jblock.toml").write_text(f'zoo = "{tmp_path}/none"\nmax_queue = 7\n')
    command = [sys.executable, "-m", "serving.main", "--config", str(tmp_path / "jblock.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert f'zoo = "{tmp_path}/none"' in done.stderr
    assert "max_queue = 7" in done.stderr and 'host = "127.0.0.1"' in done.stderr


def test_the_examples_fit(tmp_path):
    text = (ROOT / "examples" / "deploy" / "jblock.toml").read_text()
    found = expanded(tmp_path, text)
    assert "--zoo=/var/lib/jblock/zoo" in found
