"""`make soak`: half an hour of a server under more than it can do, while everything around it changes.

Twenty tenants send 1.2 times what the server can answer over TLS: requests that are answered in full, that
leave, that run out of time, that are wrong. Meanwhile models and adapters come and go, keys and certificates
are replaced, and then engine and server are killed, drained and started again. It holds that every request
ends in one of completed, cancelled, refused with a reason; that greedy answers are those of a quiet run, and
so those of transformers; and that what a process holds once it is idle is what it held before.

Every wait has a limit, past which it is a fault. So the soak ends by itself at most `SLACK_SECONDS` after its
minutes, however busy the machine is, and prints one line of JSON then, whatever happened.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from soak_run import CALM, Soak
from soak_server import Server, SoakError, Tenants
from test_tls import Authority

from examples import demo_reference, demo_zoo

OVERLOAD = 1.2
# On top of the minutes: converting, the quiet run, idle moments, and starts where the machine is busy.
SLACK_SECONDS = 600.0
# Where the phases of load end, as shares of the minutes. What comes before one takes of its time.
CAPACITY, FIRST, CALM_PARTS, KILLS, LAST = 0.08, 0.2, (0.32, 0.44, 0.56), 0.88, 1.0
COMPLETED = ("complete", "complete at a near tie", "sampled", "ended before it was cancelled")
KINDS_OF_KILLS = ("engine killed", "server killed", "drained")


async def soak(run: Soak, minutes: float) -> None:
    """The whole of it: calm changes, then kills and drains, then calm again.

    Raises:
      SoakError: it cannot go on.
    """
    await run.server.start()
    await run.quiet(per_model=3 if minutes < 10 else 8)
    begin = time.monotonic()

    def at(share: float) -> float:
        return begin + share * 60.0 * minutes

    run.rate = OVERLOAD * await run.capacity(at(CAPACITY))
    await run.phase(at(FIRST), CALM)  # All that is compiled once and cached.
    await run.idle("before the calm")
    for end in CALM_PARTS:
        await run.phase(at(end), CALM)
        await run.idle("in the calm")
    run.judge_growth()
    await run.phase(at(KILLS), (*KINDS_OF_KILLS, *CALM), least=len(KINDS_OF_KILLS))
    await run.idle("after the kills")
    await run.phase(at(LAST), CALM)
    await run.idle("at the end")
    await run.end()


def report(run: Soak, minutes: float, seconds: float) -> dict[str, Any]:
    """The last line, as values."""
    ends = run.ends
    groups = {
        "completed": sum(ends[end] for end in COMPLETED),
        "cancelled": ends["cancelled"],
        "refused": sum(n for end, n in ends.items() if end.startswith("refused")),
    }
    if sum(groups.values()) != run.sent:
        run.fault(f"{run.sent} requests were sent, and {groups} of them ended")
    lines, twice = run.server.logged()
    if twice:
        run.fault(f"the server logged the end of {twice} requests twice")
    for text in run.server.tracebacks():
        run.fault(f"a server's log has a traceback: {text[-2000:]}")
    return {
        "soak": {
            "minutes": minutes,
            "seconds": round(seconds, 1),
            "faults": len(run.faults),
            "requests": run.sent,
            **groups,
            "ends": dict(sorted(ends.items())),
            "requests_a_second": round(run.rate, 2),
            "quiet_answers": run.quiet_answers,
            "greedy_compared": ends["complete"] + ends["complete at a near tie"],
            "greedy_near_ties": ends["complete at a near tie"],
            "changes": dict(run.changes),
            "idle_moments": len(run.idles),
            "grown_while_calm": run.grown,
            "slopes_an_hour": run.slopes(),
            "logged": lines,
        },
        "faults": run.faults[:20],
    }


async def within_limits(run: Soak, minutes: float, end: float) -> None:
    """The soak; what ends it early is a fault of its."""
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + end - time.monotonic()):
            await soak(run, minutes)
    except TimeoutError:
        run.fault(f"it was not over {SLACK_SECONDS:g} s after its minutes: {run.doing}")
    except SoakError as error:
        run.fault(f"{error} ({run.doing})")


def prepared(folder: Path, seed: int) -> Soak:
    """A zoo, an authority, tenants and a server that is not started, in a folder."""
    items = demo_reference.load(demo_zoo.ROOT / "reference.json")
    names: Sequence[str] = sorted({item.model for item in items})
    family = demo_zoo.load_family(names)
    churned = [*[n for n, e in family.items() if e["kind"] == "lora"][:3], names[-1]]
    demo_zoo.convert(demo_zoo.with_bases(family), folder / "zoo")
    (folder / "ca").mkdir()
    server = Server(folder, names, Authority(folder / "ca"))
    return Soak(server, Tenants(folder / "tenants.json"), items, churned, random.Random(seed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as path:
        run = prepared(Path(path), args.seed)
        with contextlib.ExitStack() as stack:
            stack.callback(run.server.kill)
            end = begin + 60.0 * args.minutes + SLACK_SECONDS
            asyncio.run(within_limits(run, args.minutes, end))
        result = report(run, args.minutes, time.monotonic() - begin)
    print(json.dumps(result))
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
