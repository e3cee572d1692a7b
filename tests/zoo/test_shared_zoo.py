"""Three minutes of a shared zoo, in a folder with two users and in a bucket: converters, copies, activations,
removals and gc race, are killed at random, and a server loads what it holds all the while."""

import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import s3_server
import zoos

from jblock.families import families
from jblock.zoo import gc, lease
from jblock.zoo.fsck import fsck
from jblock.zoo.lease import LockedError
from jblock.zoo.records import ZooError
from jblock.zoo.store import Zoo

_CONTEXT = multiprocessing.get_context("fork")
SECONDS = 180.0
GROUP, USERS = 43000, (41001, 41002)
NAMES = ("one", "two", "three")
pytestmark = pytest.mark.long


def become(user, cache):
    os.environ["XDG_CACHE_HOME"] = f"{cache}/{user or 'root'}"
    if user:
        os.setgroups([GROUP])
        os.setgid(GROUP)
        os.setuid(user)
        os.umask(0o077)


def work(path, user, cache, seed, until, waits):
    """A user at work: one thing after the other, each in the time that anybody may wait."""
    become(user, cache)
    rng = random.Random(seed)
    while time.time() < until:
        begin = time.monotonic()
        try:
            zoo = Zoo.open(path)
            name = rng.choice(NAMES)
            do = rng.random()
            if do < 0.5:
                zoos.fill(zoo, name=name, seed=rng.randrange(6))
            elif do < 0.6:
                zoo.activate(name, rng.choice(zoo.versions(name) or [1]))
            elif do < 0.7:
                zoo.rollback(name)
            elif do < 0.8:
                gc.remove(zoo, name, rng.choice(zoo.versions(name) or [1]))
            elif do < 0.85:
                gc.remove(zoo, name)
            else:
                gc.collect(zoo, dry_run=False)
        except LockedError as e:
            waits.put(f"user {user}: {e}")
        except ZooError:
            pass  # refused, or removed meanwhile: both are told in a line
        took = time.monotonic() - begin
        if took > 90:
            waits.put(f"user {user} waited for {took:.0f} s")


def serve(path, user, cache, until, faults, served):
    """A server: holds what is active and loads it again and again, whatever is removed meanwhile."""
    become(user, cache)
    zoo = Zoo.open(path, verify="once")
    held = []
    while time.time() < until:
        for name in NAMES:
            try:
                chain = zoo.serve(name)
            except ZooError:
                continue  # nothing is active, or it was removed before it was held
            held = [*held[-8:], chain]
        for chain in held:
            try:
                for step in chain.steps:
                    zoo.load_component(step.component)
                    for delta in step.deltas:
                        zoo.load_delta(delta)
                zoo.tokenizer_path(chain.tokenizer)
                served.value += 1
            except Exception as e:
                faults.put(f"{chain.name}@{chain.version} is served and gone: {e}")
                return


def race(path, users, cache, seconds, pauses):
    """Races for some seconds, with a kill after each pause between two lengths."""
    faults, waits = _CONTEXT.Queue(), _CONTEXT.Queue()
    served = _CONTEXT.Value("i", 0)
    until = time.time() + seconds
    server = _CONTEXT.Process(target=serve, args=(path, users[0], cache, until, faults, served))
    server.start()
    rng, workers, kills = random.Random(1), {}, 0
    while time.time() < until:
        for i, user in enumerate(users * 2):
            if i not in workers or not workers[i].is_alive():
                args = (path, user, cache, rng.random(), until, waits)
                workers[i] = _CONTEXT.Process(target=work, args=args)
                workers[i].start()
        time.sleep(rng.uniform(*pauses))
        victim = workers[rng.randrange(len(workers))]
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            kills += 1
    for process in (*workers.values(), server):
        process.join(120)
        assert not process.is_alive()
    assert drain(faults, waits) == []
    assert kills > seconds / 10
    assert served.value > 10


def make(path):
    """A zoo with something to serve."""
    zoos.fill(Zoo.create(path), name="one")


def drain(*queues):
    found = []
    for queue in queues:
        while not queue.empty():
            found.append(queue.get())
    return found


@pytest.fixture
def cache():
    families()  # what is imported late, and another user may not be able to read
    folder = tempfile.mkdtemp(prefix="jblock-shared-")
    os.chmod(folder, 0o777)
    yield folder
    shutil.rmtree(folder)


def test_a_folder(cache):
    users = USERS if os.geteuid() == 0 else (0, 0)
    if not users[0]:
        print("NOT TESTED: two users need root; one user races with itself")
    inner = Path(cache, "shared")
    inner.mkdir()
    if users[0]:
        os.chown(inner, users[0], GROUP)
    os.chmod(inner, 0o2775)
    zoo = Zoo.create(inner)
    for folder, _, _ in os.walk(inner):
        if users[0]:
            os.chown(folder, users[0], GROUP)
        os.chmod(folder, 0o2775)
    race(inner, users, cache, SECONDS, (0.2, 1.5))
    assert fsck(zoo) == []
    gc.collect(zoo, dry_run=False)
    assert fsck(zoo) == []
    # Leases of the killed are gone at once; what was about to become one is when it is a minute old.
    left = list((inner / "tmp").iterdir())
    assert not any((path / "lease").exists() for path in left)
    for path in left:
        os.utime(path, (time.time() - 61, time.time() - 61))
    lease.clean(inner / "tmp")
    assert os.listdir(inner / "tmp") == []


def test_a_bucket(cache, monkeypatch):
    for key, value in s3_server.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("XDG_CACHE_HOME", f"{cache}/here")
    with s3_server.server() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        # Not opened before the others fork: the library's threads do not come along.
        maker = _CONTEXT.Process(target=make, args=("s3://zoos/shared",))
        maker.start()
        maker.join()
        # One change takes seconds beside so many others: killed more often, nobody ever ends one.
        race("s3://zoos/shared", (0, 0), cache, SECONDS, (2.0, 8.0))
        time.sleep(61)  # leases of those that were killed
        zoo = Zoo.open("s3://zoos/shared")
        assert fsck(zoo) == []
        gc.collect(zoo, dry_run=False)
        assert fsck(zoo) == []
