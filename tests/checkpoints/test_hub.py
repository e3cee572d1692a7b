"""Sources on the Hub, against a server on this machine that speaks its API."""

import contextlib
import errno
import json
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serving
from huggingface_hub import constants, file_download, hf_api
from tiny_checkpoints import files_of, write_adapter, write_checkpoint

from checkpoints import hub as source
from checkpoints.errors import CheckpointError
from checkpoints.progress import Progress

CARD = b"---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with a tiny model in two shards, and beside it what jblock never reads; an empty cache."""
    folder = write_checkpoint(tmp_path / "published", shards=2)
    files = files_of(folder) | {"pytorch_model.bin": b"pickle", "README.md": CARD}
    with serving(files) as found:
        _use(monkeypatch, found.url, tmp_path / "cache")
        yield found


def _use(monkeypatch, url: str, cache: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


def test_a_model_converts_by_its_name(hub: Hub, cli, tmp_path):
    assert "added" in cli.ok("hf", "org/model", "--name", "m")
    assert cli("verify", "m", "--against", tmp_path / "published").code == 0
    assert cli("verify", "m", "--against", "org/model@v1").code == 0
    assert set(hub.ranges) == set(hub.files) - {"pytorch_model.bin"}
    assert "Bearer hf_secret" in hub.tokens
    row = json.loads(cli.ok("list", "--json"))["chains"][0]
    assert row["origin"].keys() == {"source", "revision", "license", "date"}
    assert [row["origin"][k] for k in ("source", "revision", "license")] == [
        "org/model",
        COMMIT,
        "apache-2.0",
    ]
    shown = cli.ok("list")
    assert all(word in shown for word in ("org/model", COMMIT[:12], "apache-2.0", "exact"))
    assert "unchanged" in cli.ok("hf", f"org/model@{COMMIT}", "--name", "m")


def test_the_cache_is_enough_when_offline(hub: Hub, cli, monkeypatch):
    cli.ok("hf", "org/model@v1", "--name", "m")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.refuse = (500, None)
    assert "unchanged" in cli.ok("hf", "org/model@v1", "--name", "m")
    result = cli("hf", "org/model@other", "--name", "m")
    assert result.code == 2
    assert "HF_HUB_OFFLINE" in result.err


@pytest.fixture
def small_pieces(monkeypatch):
    """Downloads in pieces of 256 bytes, and no waiting before another try."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)


def firsts(ranges: list[str | None]) -> list[int]:
    """The first byte of each Range header."""
    return [int(r.removeprefix("bytes=").split("-")[0]) if r else 0 for r in ranges]


def test_a_broken_download_goes_on(hub: Hub, cli, small_pieces, tmp_path):
    name = max(hub.files, key=lambda n: len(hub.files[n]))
    hub.break_after = 600
    cli.ok("hf", "org/model", "--name", "m")
    begun = firsts(hub.ranges[name])
    assert len(begun) > 2
    assert begun == [512 * i for i in range(len(begun))]
    assert cli("verify", "m", "--against", tmp_path / "published").code == 0


def test_the_next_command_downloads_what_is_missing(hub: Hub, cli, small_pieces, tmp_path):
    hub.break_after, hub.then_down = 600, True
    result = cli("hf", "org/model", "--name", "m")
    assert result.code == 2
    assert "what is missing" in result.err or "try again later" in result.err
    assert "Traceback" not in result.err
    assert not cli.zoo.exists()
    complete = {p.name for p in (tmp_path / "cache").glob("models--*/snapshots/*/*")}
    assert complete < set(hub.files)
    hub.refuse = hub.break_after = None
    hub.ranges.clear()
    cli.ok("hf", "org/model", "--name", "m")
    assert set(hub.ranges) == set(hub.files) - {"pytorch_model.bin"} - complete
    assert cli("verify", "m", "--against", tmp_path / "published").code == 0


@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        ((401, None), "HF_TOKEN"),
        ((403, None), "HF_TOKEN"),
        ((401, "GatedRepo"), "gated"),
        ((403, "GatedRepo"), "gated"),
        ((404, "RepoNotFound"), "check the name"),
        ((404, "RevisionNotFound"), "no revision 'main'"),
        ((500, None), "answers with an error"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, cli, refuse, said):
    hub.refuse = refuse
    result = cli("hf", "org/model", "--name", "m")
    assert result.code == 2
    assert "org/model: " in result.err
    assert said in result.err
    assert str(refuse[0]) in result.err or refuse[1] == "RevisionNotFound"
    assert "Traceback" not in result.err


def test_a_wrong_revision_is_named(hub: Hub, cli):
    assert "no revision 'v9'" in cli("hf", "org/model@v9", "--name", "m").err


def test_nobody_answers(hub: Hub, cli, monkeypatch):
    _use(monkeypatch, "http://127.0.0.1:9", Path(constants.HF_HUB_CACHE))
    result = cli("hf", "org/model", "--name", "m")
    assert result.code == 2
    assert "check the network" in result.err


def test_a_full_disk(hub: Hub, cli, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", full)
    result = cli("hf", "org/model", "--name", "m")
    assert result.code == 2
    assert "HF_HOME" in result.err
    assert constants.HF_HUB_CACHE in result.err


def test_what_is_a_name_and_what_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert source.is_hub_name("org/model")
    assert source.is_hub_name("org/model@refs/pr/3")
    assert source.is_hub_name("org/model/file.gguf@main")
    for path in ("model", "./org/model", "/org/model", "a b/c", "org/model@"):
        assert not source.is_hub_name(path), path
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not source.is_hub_name("org/model")
    assert source.locate("org/model", Progress(False)).path == Path("org/model")


def test_progress_counts_what_is_received(hub: Hub):
    seen = []

    class Seen(Progress):
        @contextlib.contextmanager
        def bar(self, title, total):
            seen.append(total)
            yield seen.append

    wanted = source.to_download("org/model")
    assert wanted.nbytes == sum(len(b) for n, b in hub.files.items() if n != "pytorch_model.bin")
    source.locate("org/model", Seen(False))
    assert seen[0] == wanted.nbytes == sum(seen[1:])
    assert source.to_download("org/model").nbytes == 0


def test_one_file_of_a_repository(hub: Hub):
    hub.files["weights.gguf"] = b"GGUF" + b"\0" * 20
    found = source.locate("org/model/weights.gguf@v1", Progress(False))
    assert found.path.read_bytes() == hub.files["weights.gguf"]
    assert (found.source, found.revision) == ("org/model/weights.gguf", COMMIT)
    with pytest.raises(CheckpointError, match="no such file"):
        source.locate("org/model/other.gguf", Progress(False))


def test_an_adapter_by_its_name(cli, tmp_path, monkeypatch):
    base = write_checkpoint(tmp_path / "base")
    with serving(files_of(write_adapter(tmp_path / "adapter"))) as hub:
        _use(monkeypatch, hub.url, tmp_path / "cache")
        cli.ok("hf", base, "--name", "base")
        cli.ok("peft", "org/model", "--base", "base", "--name", "a")
        assert "adapter" in cli("hf", "org/model", "--name", "m").err


def test_dry_run_downloads_nothing(hub: Hub, cli):
    out = cli.ok("hf", "org/model", "--name", "m", "--dry_run")
    assert "would be downloaded" in out
    assert not hub.ranges
    assert not cli.zoo.exists()
    cli.ok("hf", "org/model", "--name", "m")
    hub.ranges.clear()
    assert "0 B of" in cli.ok("hf", "org/model", "--name", "m", "--dry_run")
