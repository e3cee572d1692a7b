"""Zoos in buckets: an S3 server of this machine, and fsspec's memory."""

import json
import os
import subprocess
import threading

import fsspec
import pytest
import s3_server
import zoos

from jblock.zoo import edges, gc, lease, registry
from jblock.zoo.edge_records import Edge, Score
from jblock.zoo.fsck import fsck
from jblock.zoo.inventory import inventory
from jblock.zoo.lease import LeaseLostError, LockedError
from jblock.zoo.listing import list_models
from jblock.zoo.object_storage import ObjectStorage
from jblock.zoo.records import Step, ZooError
from jblock.zoo.repair import repair
from jblock.zoo.store import Zoo
from jblock.zoo.transfer import copy


@pytest.fixture(scope="module")
def s3():
    with s3_server.server() as address:
        yield address


@pytest.fixture(params=["s3", "memory"])
def url(request, tmp_path, monkeypatch):
    """The URL of a zoo that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = os.urandom(6).hex()
    if request.param == "memory":
        return f"memory://{name}/zoo"
    for key, value in s3_server.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3"))
    return f"s3://zoos/{name}"


@pytest.fixture
def zoo(url):
    return Zoo.create(url)


def raw(url):
    return fsspec.core.url_to_fs(url, use_listings_cache=False)


def test_models_are_added_read_and_removed(zoo, url):
    first, second = zoos.fill(zoo), zoos.fill(zoo, seed=1)
    assert zoos.fill(zoo) == first
    again = Zoo.open(url)
    assert (again.chains(), again.versions("m"), again.active("m")) == (["m"], [1, 2], 1)
    tensors = again.load_component(second.steps[1].component, verify=True)
    assert all((tensors[n] == t).all() for n, t in zoos.tensors(zoos.FFN, 1).items())
    assert (
        again.load_component(first.steps[3].component)["weight"]
        == zoos.tensors(zoos.EMBEDDING)["weight"]
    ).all()
    assert (again.tokenizer_path(first.tokenizer) / "merges.txt").read_bytes() == b"a b"
    assert again.rollback("m").active == 2
    assert [row["active"] for row in list_models(again)["chains"]] == [False, True]
    row = inventory(again)["totals"]
    assert (row["chains"], row["components"]) == (2, 8)
    assert fsck(again) == []
    assert gc.remove(again, "m", 1) == ["m@1"]
    assert len(gc.collect(again, dry_run=False)) == 5
    assert gc.collect(again, dry_run=True) == []
    assert zoos.fill(again, seed=2).version == 3
    assert fsck(again) == []


def test_models_are_copied_to_a_bucket_and_back(zoo, tmp_path):
    folder = Zoo.create(tmp_path / "folder")
    chain = zoos.fill(folder)
    (copied,) = copy(folder, zoo, "m")
    assert (copied.chain.digest, copied.added, copied.sent_bytes > 0) == (chain.digest, True, True)
    assert copy(folder, zoo, "m")[0].sent_bytes == 0
    (back,) = copy(zoo, Zoo.create(tmp_path / "back"), "m")
    assert back.chain == chain
    assert fsck(zoo) == fsck(Zoo.open(tmp_path / "back")) == []


def test_two_writers_of_one_name_never_overwrite_each_other(zoo, url):
    errors = []

    def add(seed):
        try:
            zoos.fill(Zoo.open(url), seed=seed)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert zoo.versions("m") == [1, 2, 3]
    assert fsck(zoo) == []


def test_a_pointer_is_put_only_where_nobody_was_faster(zoo):
    zoos.fill(zoo)
    stale = registry.read(zoo.storage, "m")
    zoos.fill(zoo, seed=1)
    with (
        pytest.raises(LeaseLostError, match="changed by another process"),
        zoo.changing("a late one") as changes,
    ):
        registry.activate(changes, stale, 1)
    assert zoo.active("m") == 2


def test_who_lost_the_lock_cannot_change_anything(zoo, monkeypatch):
    zoos.fill(zoo)
    with pytest.raises(LeaseLostError), zoo.changing("slept") as changes:
        zoo.storage.write("locks/99", b"another")
        changes.remove("chains/m/1.json")
    assert zoo.chain("m").version == 1


def test_a_killed_holder_is_waited_for_and_no_longer(zoo, monkeypatch, capsys):
    zoo.storage.write("tmp/dead/lease", b'{"user": "ada", "pid": 7, "node": "n", "purpose": "gc"}')
    zoo.storage.write("locks/1", b"dead")
    now = zoo.storage.now()
    assert not zoo.storage.expired("dead", now)
    assert zoo.storage.expired("dead", now + 2 * lease.SECONDS)
    asked = []

    def expired(name, now):  # counted, for a busy machine would expire others too
        asked.append(name)
        return asked.count("dead") > 2

    monkeypatch.setattr(zoo.storage, "expired", expired)
    monkeypatch.setattr(zoo.storage, "clean", lambda: None)  # asks too
    monkeypatch.setattr("jblock.zoo.object_lease._TELL_SECONDS", 0.0)
    zoos.fill(zoo)
    assert "process 7 of ada on n (gc)" in capsys.readouterr().err
    assert zoo.chains() == ["m"]


@pytest.mark.parametrize("ours", [True, False])
def test_a_killed_holder_of_this_host_is_not_waited_for(zoo, monkeypatch, capsys, ours):
    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr(lease, "MAX_WAIT_SECONDS", 0.5)
    said = {"user": "ada", "pid": dead.pid, "node": "n", "purpose": "gc"}
    said["space"] = lease.process_space() if ours else "another"
    zoo.storage.write("tmp/dead/lease", json.dumps(said).encode())
    zoo.storage.write("locks/1", b"dead")
    if ours:
        zoos.fill(zoo)
        assert zoo.chains() == ["m"]
    else:
        with pytest.raises(LockedError, match=f"process {dead.pid} of ada"):
            zoos.fill(zoo)


def test_a_living_holder_of_this_host_is_waited_for(zoo, monkeypatch):
    monkeypatch.setattr(lease, "MAX_WAIT_SECONDS", 0.5)
    with zoo.changing("a long gc"), pytest.raises(LockedError, match="a long gc"):
        zoos.fill(Zoo.open(zoo.storage.location))


def test_what_a_lease_names_is_not_removed(zoo, url):
    chain = zoos.fill(zoo)
    served = Zoo.open(url)
    served.hold(served.chain("m"))
    gc.remove(zoo, "m")
    assert gc.collect(zoo, dry_run=False) == []
    Zoo.open(url).load_component(chain.steps[0].component, verify=True)
    served.release()
    assert len(gc.collect(zoo, dry_run=False)) == 6


def test_half_an_upload_is_not_there(zoo, url):
    chain = zoos.fill(zoo)
    ffn = chain.steps[1].component
    fs, base = raw(url)
    fs.rm(f"{base}/components/{ffn}/spec.json")
    with pytest.raises(ZooError, match="removed or never added"):
        Zoo.open(url).storage.fetch(f"components/{'0' * 64}", lambda path: None)
    assert not Zoo.open(url).storage.exists(f"components/{ffn}")
    assert zoos.fill(Zoo.open(url)) == chain
    assert Zoo.open(url).storage.exists(f"components/{ffn}")


def test_what_is_fetched_is_checked(zoo, url, tmp_path, monkeypatch):
    chain = zoos.fill(zoo)
    ffn = chain.steps[1].component
    fs, base = raw(url)
    key = f"{base}/components/{ffn}/params.safetensors"
    data = fs.cat_file(key)
    fs.pipe_file(key, data[:-1] + bytes([data[-1] ^ 1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    fresh = Zoo.open(url)
    with pytest.raises(ZooError, match="other content"):
        fresh.load_component(ffn)
    assert fsck(fresh)
    assert any("quarantine" in line for line in repair(fresh))
    assert (fresh.chains(), fsck(fresh)) == ([], [])
    assert zoos.fill(fresh) == chain


def test_edges_lie_there_too(zoo):
    chain = zoos.fill(zoo)
    other = zoo.put_component(zoos.FFN, zoos.tensors(zoos.FFN, 5))
    edge = Edge(
        kind="equivalent",
        original=(Step(component=chain.steps[1].component),),
        substitute=(Step(component=other),),
        scores={"parameter_cosine": Score(value=0.9)},
    )
    edges.put_edges(zoo, edge)
    assert edges.edges(zoo) == [edge]
    assert gc.collect(zoo, dry_run=False) == []
    edges.remove_edge(zoo, edge.id)
    assert [g.id for g in gc.collect(zoo, dry_run=False)] == [other]


@pytest.mark.parametrize("bad", ["nope://x/y", "s3://", "http://127.0.0.1:9/x"])
def test_other_urls_are_told(bad, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for key, value in s3_server.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ZooError):
        Zoo.open(bad)


def test_a_bucket_that_nobody_made_is_told(url):
    if url.startswith("s3://"):
        with pytest.raises(ZooError, match="no such bucket"):
            Zoo.create("s3://nobody-made-it/zoo")


def test_a_bucket_that_is_away_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage = ObjectStorage("memory://away/zoo")

    def away(*args, **kwargs):
        raise OSError("the network is unreachable")

    monkeypatch.setattr(storage._fs, "cat_file", away, raising=False)
    monkeypatch.setattr(storage._fs, "ls", away, raising=False)
    with pytest.raises(ZooError, match="cannot be reached"):
        storage.read("zoo.json")
    with pytest.raises(ZooError, match="cannot be reached"):
        storage.names("chains")
