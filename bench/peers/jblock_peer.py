"""jblock itself, over its gRPC server with the engine in a process of its own, tokens as they come."""

import asyncio
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.peers.load import Clock, main

# Longer than the longest compilation: nothing else tells that the background has settled.
_SETTLE_S = 15.0
_STEP_MS = 2000


class JblockPeer:
    """See load.Peer."""

    def __init__(self, spec: Mapping[str, Any]):
        """Starts the server on the zoo in the driver's folder; its port file says when it is ready."""
        folder, sizes = Path(spec["folder"]), spec["sizes"]
        port_file = folder / "port"
        port_file.unlink(missing_ok=True)
        models = [*spec["models"], *spec["adapters"]]
        streams = max(*sizes["streams"], sizes["requests"])
        self._log = (folder / "server.log").open("wb")
        self._server = subprocess.Popen(
            [
                *(
                    sys.executable,
                    "-m",
                    "serving.main",
                    "--zoo",
                    str(folder / "zoo"),
                    "--port",
                    "0",
                ),
                *("--port_file", str(port_file), "--models", ",".join(models)),
                *("--dtype", spec["dtype"], "--max_num_seqs", str(streams)),
                *("--max_model_len", str(sizes["max_len"]), "--metrics_port", "0"),
                # Work that comes at once and is waited for as a whole: throughput, not smooth streams.
                *("--step_ms", str(_STEP_MS)),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"},
            text=True,
        )
        while not port_file.exists():
            if self._server.poll() is not None:
                raise RuntimeError(
                    f"the server ended with {self._server.returncode}: {self._log.name}"
                )
            time.sleep(0.02)
        self._target = f"127.0.0.1:{port_file.read_text().strip()}"
        self.notes: dict[str, Any] = {"arrangement": "one server for all"}
        self._settled = False
        line = self._server.stdout.readline()
        found = re.search(r"metrics on port (\d+)", line)
        if found is None:
            raise RuntimeError(f"the server's first line names no metrics port: {line!r}")
        self._metrics = found[1]
        self._loop = asyncio.new_event_loop()

    def run(self, clock: Clock) -> None:
        """See load.Peer. The first call waits until the programs made in the background are there."""
        if not self._settled:
            self._settle()
            self._settled = True
            fresh = Clock(clock.asks)
            self._loop.run_until_complete(self._run(fresh))
            clock.times, clock.ids = fresh.times, fresh.ids
            return
        self._loop.run_until_complete(self._run(clock))
        self.notes["compiles_on_serving_path"] = self._counter("compiles_on_serving_path")

    def close(self) -> None:
        """See load.Peer."""
        self._server.terminate()
        self._server.wait(timeout=60)
        self._log.close()

    def _settle(self) -> None:
        begin = seen = time.monotonic()
        programs = -1.0
        while time.monotonic() - seen < _SETTLE_S:
            count = self._counter("compiles_in_background")
            if count != programs:
                programs, seen = count, time.monotonic()
            time.sleep(0.25)
        self.notes["settled_after_ready_s"] = round(seen - begin, 2)

    def _counter(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics") as page:
            lines = page.read().decode().splitlines()
        value = next(x for x in lines if x.startswith((f"jblock_{name}_total ", f"jblock_{name} ")))
        return float(value.split()[-1])

    async def _run(self, clock: Clock) -> None:
        from serving.client import AsyncClient

        async with AsyncClient(self._target, timeout=600) as client:

            async def stream(i: int) -> None:
                ask = clock.asks[i]
                chunks = client.stream(
                    ask.model, ask.prompt, max_tokens=ask.max_tokens, ignore_eos=True
                )
                async for chunk in chunks:
                    clock.note(i, chunk.token_ids)

            await asyncio.gather(*map(stream, range(len(clock.asks))))


if __name__ == "__main__":
    main(JblockPeer)
