"""Leases: the dead are told from the living, one holds the lock at a time, and late ones do no harm."""

import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time

import pytest
import zoos

from jblock.zoo import lease
from jblock.zoo.fsck import fsck
from jblock.zoo.lease import LeaseLostError
from jblock.zoo.storage import FolderChanges
from jblock.zoo.store import Zoo

_CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture
def zoo(tmp_path):
    return Zoo.create(tmp_path / "zoo")


def elsewhere(tmp, name, age, seconds=60.0):
    """A lease of a process on another host, which gave its last sign `age` seconds ago."""
    folder = tmp / name
    folder.mkdir()
    (folder / "lease").write_text(json.dumps({"host": "another", "seconds": seconds}))
    then = time.time() - age
    os.utime(folder / "lease", (then, then))
    return folder


def hold(root, started):
    with lease.exclusive(root):
        started.set()
        time.sleep(60)


def count(root, times):
    counter = root / "counter"
    for _ in range(times):
        with lease.exclusive(root):
            value = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(value + 1))


def die_before_call(number):
    """Lets this process be killed before a system call that making a lease takes."""
    countdown = itertools.count(number, -1)

    def fatal(call):
        def wrapped(*args, **kwargs):
            if next(countdown) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("mkdir", "open", "write", "rename", "chmod", "lstat"):
        setattr(os, name, fatal(getattr(os, name)))
    fcntl.flock = fatal(fcntl.flock)


def make_and_die(tmp, send):
    """Makes leases, killed before each system call of it in turn; sends what `clean` then leaves of each."""
    left = []
    for number in itertools.count():
        pid = os.fork()
        if pid == 0:
            die_before_call(number)
            lease._make(tmp, 60.0, "")
            os._exit(0)
        finished = os.waitpid(pid, 0)[1] == 0
        lease.clean(tmp)
        left.append([sorted(os.listdir(tmp / name)) for name in os.listdir(tmp)])
        if finished:
            return send.send(left)
        shutil.rmtree(tmp)
        tmp.mkdir()


def test_who_dies_while_it_makes_a_lease_leaves_none(zoo):
    receive, send = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=make_and_die, args=(zoo.path / "tmp", send))
    process.start()
    *left, finished = receive.recv()
    process.join()
    assert len(left) >= 7  # so many moments
    # Nothing that looks like a lease: a folder under another name, which goes when it is old.
    assert not any("lease" in names for found in left for names in found)
    assert [found for found in left if found] != []
    assert finished == []  # dead with a whole lease


def test_a_dead_holder_on_this_host_is_told_at_once(zoo):
    started = _CONTEXT.Event()
    process = _CONTEXT.Process(target=hold, args=(zoo.path, started))
    process.start()
    started.wait()
    assert lease.clean(zoo.path / "tmp") == 0  # it lives
    process.kill()
    process.join()
    begin = time.monotonic()
    with lease.exclusive(zoo.path):
        assert time.monotonic() - begin < 5
    assert os.listdir(zoo.path / "tmp") == []


def test_a_holder_on_another_host_is_waited_for_until_it_expires(zoo):
    tmp = zoo.path / "tmp"
    late = elsewhere(tmp, "late", age=61)
    alive = elsewhere(tmp, "alive", age=30)
    assert lease.clean(tmp) == 1
    assert (late.exists(), alive.exists()) == (False, True)
    shutil.rmtree(alive)
    elsewhere(tmp, "holder", age=0, seconds=1.0)
    (zoo.path / "locks" / "7").write_text("holder")
    begin = time.monotonic()
    with lease.exclusive(zoo.path):
        assert 0.5 < time.monotonic() - begin < 10
        assert os.listdir(zoo.path / "locks") == ["8"]  # numbers only grow


def test_what_is_being_made_is_not_swept_and_remnants_are(zoo):
    tmp = zoo.path / "tmp"
    (tmp / "new").mkdir()
    (tmp / "remnant").mkdir()
    (tmp / "file.lock").write_text("")
    for name in ("remnant", "file.lock"):
        os.utime(tmp / name, (1, 1))
    assert lease.clean(tmp) == 2
    assert os.listdir(tmp) == ["new"]


def test_one_at_a_time(zoo):
    counter = zoo.path / "counter"
    counter.write_text("0")
    args = (zoo.path, 20)
    threads = [threading.Thread(target=count, args=args) for _ in range(2)]
    processes = [_CONTEXT.Process(target=count, args=args) for _ in range(2)]
    for runner in (*processes, *threads):
        runner.start()
    for runner in (*processes, *threads):
        runner.join()
    assert counter.read_text() == "80"
    assert len(os.listdir(zoo.path / "locks")) == 1


def test_signs_keep_a_short_lease_alive(zoo):
    with lease.lease(zoo.path / "tmp", seconds=1.0) as mine:
        first = (mine / "lease").stat().st_mtime
        time.sleep(0.5)
        assert (mine / "lease").stat().st_mtime > first


def broken(folder):
    """What another host does to a lease that has expired."""
    os.rename(folder, folder.with_name("gone-x"))
    shutil.rmtree(folder.with_name("gone-x"))


def test_who_lost_the_lock_cannot_publish(zoo, monkeypatch):
    chain = zoos.fill(zoo)
    before = {p: p.read_bytes() for p in zoo.path.glob("chains/**/*") if p.is_file()}
    put = FolderChanges.put

    def late(self, name, data):
        broken(self.scratch)  # this process slept here, and the lock was given to another
        put(self, name, data)

    monkeypatch.setattr(FolderChanges, "put", late)
    with pytest.raises(LeaseLostError, match="stood still"):
        zoo.publish(chain.from_json(chain.to_json() | {"name": "other", "version": 0}))
    assert {p: p.read_bytes() for p in zoo.path.glob("chains/**/*") if p.is_file()} == before
    assert zoo.chains() == ["m"]
    assert fsck(zoo) == []


def test_who_lost_its_lease_cannot_add(zoo):
    with pytest.raises(LeaseLostError), zoo.writer() as writer:
        writer.put_component(zoos.NORM, zoos.tensors(zoos.NORM))
        broken(writer._scratch)
        writer.commit()
    assert os.listdir(zoo.path / "components") == []
