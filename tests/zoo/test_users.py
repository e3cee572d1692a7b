"""Two users of one group share a zoo: what one leaves behind, whatever its umask, locks nobody out."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import zoos

from jblock.families import families
from jblock.zoo import gc, lease
from jblock.zoo.fsck import fsck
from jblock.zoo.inventory import inventory
from jblock.zoo.lease import LockedError
from jblock.zoo.listing import list_models
from jblock.zoo.records import Chain
from jblock.zoo.repair import repair
from jblock.zoo.storage import FolderStorage
from jblock.zoo.store import Zoo

_CONTEXT = multiprocessing.get_context("fork")
ADA, BOB, GROUP = 41001, 41002, 43000
needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="NOT TESTED: two users need root; run the tests as root once"
)


def as_user(uid, umask, work, *args):
    """Runs `work` in a process of a user; its exit code, or minus the signal that ended it."""

    def run():
        os.setgroups([GROUP])
        os.setgid(GROUP)
        os.setuid(uid)
        os.umask(umask)
        work(*args)

    process = _CONTEXT.Process(target=run)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("it waited for over two minutes")
    return process.exitcode


@pytest.fixture
def shared():
    """A folder that a group may write to, where both users can reach it."""
    families()  # what a check imports late, and another user may not be able to read
    folder = tempfile.mkdtemp(prefix="jblock-users-")
    os.chmod(folder, 0o755)
    inner = Path(folder, "shared")
    inner.mkdir()
    os.chown(inner, ADA, GROUP)
    os.chmod(inner, 0o2775)
    yield inner / "zoo"
    shutil.rmtree(folder)


def make(path):
    path.mkdir()
    os.chmod(path, 0o2775)
    Zoo.create(path)


def fill(path, name, seed):
    zoos.fill(Zoo.open(path), name=name, seed=seed)


def die_with_the_lock(path):
    with lease.exclusive(path):
        os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(path):
    with Zoo.open(path).writer("0" * 64) as writer:
        writer.put_component(zoos.FFN, zoos.tensors(zoos.FFN, 9))
        writer.commit()
        writer.put_component(zoos.NORM, zoos.tensors(zoos.NORM, 9))
        os.kill(os.getpid(), signal.SIGKILL)


def upkeep(path):
    zoo = Zoo.open(path)
    gc.remove(zoo, "m")
    gc.collect(zoo, dry_run=False)
    zoo.activate("n", 1)
    assert fsck(zoo) == []
    assert repair(zoo) == []


def reads_all(path):
    zoo = Zoo.open(path)
    for name in zoo.chains():
        for step in zoo.chain(name).steps:
            zoo.load_component(step.component, verify=True)


@needs_root
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
@pytest.mark.parametrize("die", [die_with_the_lock, die_half_way])
def test_a_killed_writer_locks_nobody_out(shared, umask, die):
    assert as_user(ADA, umask, make, shared) == 0
    assert as_user(ADA, umask, fill, shared, "m", 0) == 0
    assert as_user(ADA, umask, die, shared) == -signal.SIGKILL
    begin = time.monotonic()
    assert as_user(BOB, umask, fill, shared, "n", 1) == 0
    assert as_user(BOB, umask, fill, shared, "m", 2) == 0  # a version of the other's model
    assert as_user(BOB, umask, reads_all, shared) == 0
    assert as_user(BOB, umask, upkeep, shared) == 0
    assert as_user(ADA, umask, fill, shared, "m", 3) == 0
    assert time.monotonic() - begin < 90
    assert fsck(Zoo.open(shared)) == []


@needs_root
def test_a_lease_that_cannot_be_read_expires_by_the_time_of_its_folder(shared):
    assert as_user(ADA, 0o002, make, shared) == 0
    tmp = shared / "tmp"
    folder = tmp / "private"
    folder.mkdir(mode=0o700)
    (folder / "lease").write_text("{}")
    os.chown(folder, ADA, ADA)
    (shared / "locks" / "7").write_text("private")
    os.utime(folder, (time.time() - 100, time.time() - 100))
    begin = time.monotonic()
    assert as_user(BOB, 0o002, fill, shared, "m", 0) == 0
    assert time.monotonic() - begin < 30


# Of one user


def goes_on_without(path):
    zoo = Zoo.open(path)
    zoos.fill(zoo, "new", seed=3)
    for found in (inventory(zoo), list_models(zoo)):
        assert "new" in [row["name"] for row in found["chains"]]
    problems = []
    gc.remove(zoo, "new", problems=problems)
    gc.collect(zoo, dry_run=False, problems=problems)
    assert any("nothing says that it is damaged" in line for line in fsck(zoo))
    assert repair(zoo) == []


@needs_root
@pytest.mark.parametrize("file", ["components/{c}", "deltas/{d}", "tokenizers/{t}", "chains/n"])
def test_a_folder_that_cannot_be_read_stops_nothing_else_and_stays(shared, file):
    assert as_user(ADA, 0o002, make, shared) == 0
    assert as_user(ADA, 0o002, fill, shared, "n", 1) == 0
    zoo = Zoo.open(shared)
    chain = zoo.chain("n")
    step = chain.steps[1]
    folder = shared / file.format(c=step.component, d=step.deltas[0], t=chain.tokenizer)
    folder.chmod(0)
    assert as_user(BOB, 0o002, goes_on_without, shared) == 0
    folder.chmod(0o2775)
    assert fsck(zoo) == [] and zoo.chain("n") == chain


def test_who_waits_says_for_whom_and_gives_up(tmp_path, monkeypatch, capsys):
    zoo = Zoo.create(tmp_path / "zoo")
    monkeypatch.setattr(lease, "MAX_WAIT_SECONDS", 1.0)
    monkeypatch.setattr(lease, "_TELL_SECONDS", 0.2)
    with (
        zoo.changing("a long gc"),
        pytest.raises(LockedError, match=rf"process {os.getpid()} of .* \(a long gc\)"),
    ):
        zoos.fill(Zoo.open(zoo.path))
    told = capsys.readouterr().err
    assert f"waiting for process {os.getpid()} of {lease.user()}" in told
    assert "a long gc" in told and "s more" in told
    assert zoos.fill(zoo).version == 1


def test_a_lock_whose_maker_died_before_it_wrote_is_free_after_a_while(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    lock = zoo.path / "locks" / "3"
    lock.write_text("")
    os.utime(lock, (time.time() - 61, time.time() - 61))
    assert zoos.fill(zoo).version == 1
    assert os.listdir(zoo.path / "locks") == ["5"] or zoo.chains() == ["m"]


def test_no_hard_links_are_needed(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    zoo = Zoo.create(tmp_path / "zoo")
    chain = zoos.fill(zoo)
    zoo.publish(Chain.from_json(chain.to_json() | {"name": "n", "version": 0}))
    assert fsck(zoo) == []


def test_a_file_system_that_copies_folders_is_refused_at_once(tmp_path, monkeypatch):
    rename = os.rename

    def only_files(source, target):
        if os.path.isdir(source):
            raise OSError(95, "Operation not supported")
        rename(source, target)

    monkeypatch.setattr(os, "rename", only_files)
    begin = time.monotonic()
    from jblock.zoo.records import ZooError

    with pytest.raises(ZooError, match="cannot hold a zoo"):
        Zoo.create(tmp_path / "zoo")
    assert time.monotonic() - begin < 5


def test_a_server_keeps_what_it_serves(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    chain = zoos.fill(zoo)
    served = Zoo.open(zoo.path)
    served.serve("m")
    gc.remove(zoo, "m")
    assert gc.collect(zoo, dry_run=False) == []
    for step in chain.steps:
        served.load_component(step.component, verify=True)
    served.load_delta(chain.steps[1].deltas[0], verify=True)
    served.tokenizer_path(chain.tokenizer)
    del served
    assert len(gc.collect(zoo, dry_run=False)) == 6


def test_a_server_that_stood_still_holds_all_of_it_again(tmp_path):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)
    zoos.fill(zoo, name="n", seed=1)
    served = Zoo.open(zoo.path)
    chain = served.serve("m")
    (broken,) = (zoo.path / "tmp").iterdir()
    shutil.rmtree(broken)  # its lease had expired
    served.serve("n")
    gc.remove(zoo, "m")
    assert gc.collect(zoo, dry_run=False) == []
    for step in chain.steps:
        served.load_component(step.component, verify=True)
    served.release()
    assert gc.collect(zoo, dry_run=False) != []


def test_a_zoo_that_cannot_be_written_to_is_served_and_told(tmp_path, monkeypatch, capsys):
    zoo = Zoo.create(tmp_path / "zoo")
    zoos.fill(zoo)

    def read_only(self, purpose):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(FolderStorage, "lease", read_only)
    assert Zoo.open(zoo.path).serve("m").version == 1
    assert "nothing keeps 'gc' from removing" in capsys.readouterr().err
