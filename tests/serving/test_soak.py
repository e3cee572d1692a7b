"""A soak over the real server: whatever its clients do, everything comes back and nothing grows."""

import asyncio
import os
import time
from pathlib import Path

import pytest
import soak_load

from examples import demo_reference, demo_server, demo_zoo

REQUESTS = 2000
SWAPS = (5, 15)  # A change waits its turn while much is compiled, as in the first half.
MIB = 2**20
# What memory may grow by in the second half: allocators and caches breathe.
GROWTH = (0.05, 30 * MIB)
QUIET_SECONDS = 15.0


def resident(pid: int) -> int:
    """Bytes of memory a process holds now."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """Processes that a process started and that are there."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            continue
        if folder.name.isdecimal() and int(parent) == pid:
            found.append(int(folder.name))
    return found


def settled(server) -> dict[str, float]:
    """The counters once nothing runs and the background compiler has been quiet for a while."""
    counters, since = server.counters(), time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        time.sleep(1.0)
        now = server.counters()
        if now["compiles_in_background"] != counters["compiles_in_background"]:
            since = time.monotonic()
        counters = now
    return counters


def idle(counters: dict[str, float]) -> dict[str, float]:
    """What an idle server must have, whatever it did before."""
    names = ("pages_free", "pages_total", "rows_free", "rows_total", "running", "waiting")
    return {name: counters[name] for name in (*names, "requests_open", "resident_bytes")}


@pytest.mark.long
def test_two_thousand_requests_leave_nothing_behind(tmp_path, capsys):
    items = demo_reference.load(demo_zoo.ROOT / "reference.json")
    names = sorted({item.model for item in items})
    demo_zoo.convert(demo_zoo.with_bases(demo_zoo.load_family(names)), tmp_path / "zoo")
    begin = time.monotonic()
    with demo_server.start(tmp_path / "zoo", names, tmp_path / "server.log") as server:
        server.wait_until_ready()
        pids = (server.process.pid, *children(server.process.pid))
        assert len(pids) == 2, "the server and its engine"
        start = idle(server.counters())
        assert start["pages_free"] == start["pages_total"]
        assert start["rows_free"] == start["rows_total"]

        figures = []
        for half in range(2):
            jobs = soak_load.plan(items, REQUESTS // 2, seed=half)
            load_begin = time.monotonic()
            ends = asyncio.run(soak_load.run(server.target, jobs, SWAPS[half]))
            seconds = time.monotonic() - load_begin
            counters = settled(server)
            memory = [resident(pid) for pid in pids]
            files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
            figures.append((counters, memory, files))
            with capsys.disabled():
                print(
                    f"\nhalf {half}: {seconds:.0f} s, {dict(ends)}, RSS of server and engine "
                    f"{[round(m / MIB) for m in memory]} MiB, "
                    f"{counters['compiles_in_background']:.0f} background compiles"
                )
            assert not [end for end in ends if end.startswith("wrong")], ends
            complete = ends["complete"] + ends["complete at a near tie"]
            assert complete == sum(job.kind == "complete" for job in jobs)
            assert ends["sampled"] == sum(job.kind == "sampled" for job in jobs)
            assert ends["cancelled"] > 0.25 * len(jobs)
            assert idle(counters) == start
            assert counters["compiles_on_serving_path"] == 0
        (middle, before, files_before), (end, after, files_after) = figures
        assert files_after == files_before
        assert end["compiles_in_background"] == middle["compiles_in_background"]
        for was, now in zip(before, after, strict=True):
            assert now - was < max(GROWTH[0] * was, GROWTH[1])
        server.process.terminate()
        assert server.process.wait(30) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log
    with capsys.disabled():
        print(f"the soak took {time.monotonic() - begin:.0f} s")
