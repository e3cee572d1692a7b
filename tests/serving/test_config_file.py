"""Flags in a file: checked by name and value, and overridden by those of the command line."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In a process of its own, where no other program's flags are defined.
CHILD = """
import json, sys
import serving.main
from absl import flags
from serving import config_file
answers = []
for path, more in json.load(sys.stdin):
    try:
        argv = config_file.expanded(["jblock-serve", f"--config={path}", *more], flags.FLAGS)
        answers.append(argv[1:])
    except ValueError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""
WRONG = {
    "prot = 9000": "'prot' is no option",
    "port = [1]": "port: is neither a number",
    "port = true": "port: True is no value of it",
    "port = ": "cannot be read",
    "verbosity = 1": "'verbosity' is no option",
    'config = "x"': "'config' is no option",
}


def expanded(cases: list[tuple[Path, list[str]]]) -> list:
    """The flags, or the words of the refusal, of each case."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([(str(path), more) for path, more in cases]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_files_say_is_checked_and_stands_before_the_command_line(tmp_path):
    good = 'zoo = "/zoo"\nport = 9000\nmodels = ["a", "b"]\nopen_health = true\nshare = false\n'
    cases = [(tmp_path / "good.toml", ["--port=1"])]
    cases[0][0].write_text(good)
    for at, text in enumerate(WRONG):
        cases.append((tmp_path / f"{at}.toml", []))
        cases[-1][0].write_text(text)
    cases.append((ROOT / "examples" / "deploy" / "jblock.toml", []))
    found, *refused, example = expanded(cases)
    assert found[:5] == ["--zoo=/zoo", "--port=9000", "--models=a,b", "--open_health", "--noshare"]
    assert found[-1] == "--port=1"
    for words, told in zip(WRONG.values(), refused, strict=True):
        assert words in told
    assert "--zoo=/var/lib/jblock/zoo" in example


def test_a_value_that_does_not_fit_ends_the_server(tmp_path):
    (tmp_path / "jblock.toml").write_text('zoo = "/none"\nport = "many"\n')
    command = [sys.executable, "-m", "serving.main", "--config", str(tmp_path / "jblock.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2
    assert "port" in done.stderr and "Traceback" not in done.stderr


def test_what_is_in_force_is_printed(tmp_path):
    (tmp_path / "jblock.toml").write_text(f'zoo = "{tmp_path}/none"\nmax_queue = 7\n')
    command = [sys.executable, "-m", "serving.main", "--config", str(tmp_path / "jblock.toml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert f'zoo = "{tmp_path}/none"' in done.stderr
    assert "max_queue = 7" in done.stderr and 'host = "127.0.0.1"' in done.stderr
