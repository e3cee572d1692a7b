"""`jblock-client` with prompts from files."""

import json

import pytest

from serving import client_main


@pytest.fixture
def run(fast, capsys):
    def ask(*words):
        argv = ["jblock-client", "--target", fast.target, "generate", "--model", "echo", *words]
        code = client_main.main(client_main.parse(argv))
        return code, capsys.readouterr().out

    return ask


def test_a_prompt_from_a_file(run, tmp_path):
    (tmp_path / "prompt").write_text("hello world")
    code, out = run("--prompt_file", str(tmp_path / "prompt"), "--max_tokens", "3")
    assert code == 0 and out == run("--prompt", "hello world", "--max_tokens", "3")[1]
    assert run("--prompt_file", str(tmp_path / "none"))[0] == 2


def test_a_prompt_a_line(run, tmp_path):
    (tmp_path / "prompts").write_text("hello\n\nworld\n")
    code, out = run("--prompts_file", str(tmp_path / "prompts"), "--max_tokens", "3")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 2
    assert all(len(answer["token_ids"]) == 3 for answer in answers)
