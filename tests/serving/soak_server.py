"""The server of a soak, its tenants and its certificate: started, replaced and looked into, within bounds."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from test_soak import children, resident
from test_tls import Authority

from examples import demo_server

TENANTS = 20
# Seconds that a server may take until it serves, until it has ended, and until it has read a file again.
START_SECONDS = 300.0
END_SECONDS = 60.0
RELOAD_SECONDS = 60.0


class SoakError(RuntimeError):
    """The soak cannot go on; the message says why."""


async def until(what: str, seconds: float, holds: Callable[[], bool]) -> None:
    """Looks again and again until something holds; `holds` runs in a thread.

    Raises:
      SoakError: it does not within these seconds.
    """
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(holds):
        if time.monotonic() > end:
            raise SoakError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(0.2)


class Tenants:
    """The tenants' file, and the keys that are good now."""

    def __init__(self, path: Path):
        self.path = path
        self.keys = [f"key-{number}-0" for number in range(TENANTS)]
        self._turn = 0
        self._next = self.keys
        self.write()

    def write(self) -> None:
        """Writes it aside and renames it; the next keys are good too."""
        entries: list[dict] = [{"name": "ops", "key_sha256": [_digest("ops")], "admin": True}]
        for number, key in enumerate(self.keys):
            keys = dict.fromkeys([key, self._next[number]])
            entries.append(
                {
                    "name": f"t{number:02}",
                    "key_sha256": [_digest(k) for k in keys],
                    "weight": 1.0 + number % 3,
                    "priority_ceiling": 0,
                    "max_requests": 24,
                }
            )
        _replace(self.path, json.dumps({"tenants": entries}).encode())

    def turn(self) -> list[str]:
        """Makes new keys known, and those before the ones of now unknown; the new ones."""
        self._turn += 1
        self._next = [f"key-{n}-{self._turn}" for n in range(TENANTS)]
        self.write()
        return self._next

    def adopt(self) -> None:
        """The new keys are used from now on."""
        self.keys = self._next


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _replace(path: Path, data: bytes) -> None:
    aside = path.with_name(f"{path.name}.new")
    aside.write_bytes(data)
    aside.chmod(0o600)
    os.replace(aside, path)


class Server:
    """`jblock-serve` at one address, started as often as it takes."""

    def __init__(self, folder: Path, models: Sequence[str], authority: Authority):
        self.folder, self.models, self.authority = folder, models, authority
        self.port, self.metrics_port = _free_port(), _free_port()
        self.process: subprocess.Popen | None = None
        self.starts = 0
        self.sign()

    def sign(self) -> None:
        """A new certificate of the same authority, as files."""
        tls = self.authority.sign("fresh", "DNS:localhost,IP:127.0.0.1")
        for source, name in ((tls.key_file, "server.key"), (tls.cert_file, "server.pem")):
            _replace(self.folder / name, Path(source).read_bytes())

    def shows_its_certificate(self) -> bool:
        """Whether a new connection is shown the certificate of the file."""
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        context.set_alpn_protocols(["h2"])
        file = ssl.PEM_cert_to_DER_cert((self.folder / "server.pem").read_text())
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), 10.0) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as connection,
            ):
                return connection.getpeercert(binary_form=True) == file
        except OSError:
            return False

    async def start(self) -> None:
        """Starts it and waits until it serves.

        Raises:
          SoakError: it ended, or takes too long.
        """
        self.starts += 1
        log = self.folder / f"server-{self.starts}.log"
        flags = {
            "port": self.port,
            "metrics_port": self.metrics_port,
            "drain_seconds": 5,
            "auth_file": self.folder / "tenants.json",
            "tls_cert_file": self.folder / "server.pem",
            "tls_key_file": self.folder / "server.key",
            "executable_cache": self.folder / "programs",
            "request_log": self.folder / "requests.jsonl",
            "max_queue": 64,
            "adapter_slots": 2,
            # Few programs, so that all are there before what a process holds is compared.
            "max_num_seqs": 16,
            "decode_sizes": 16,
            "prefill_grids": "4x32",
        }
        command = demo_server.command(
            self.folder / "zoo", self.models, *(f"--{n}={v}" for n, v in flags.items())
        )
        with log.open("w") as file:
            process = self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT
            )

        def serves() -> bool:
            text = log.read_text(errors="replace")
            if process.poll() is not None:
                raise SoakError(f"the server ended: {text[-2000:]}")
            return "jblock: serving" in text

        await until("the server serves", START_SECONDS, serves)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def end(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the end; the exit code.

        Raises:
          SoakError: it does not end.
        """
        assert self.process is not None
        process = self.process
        process.send_signal(number)
        what = f"the server ends on {number.name}"
        await until(what, END_SECONDS, lambda: process.poll() is not None)
        assert process.returncode is not None
        return process.returncode

    def kill(self) -> None:
        """Ends it, whatever it does."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def engine_pid(self) -> int | None:
        """The process of its engine; None: there is none just now."""
        for pid in children(self.pid):
            with contextlib.suppress(OSError):
                if b"engine.process.server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def figures(self) -> dict[str, float]:
        """Numbers of now: of its metrics, and of its processes as the kernel has them.

        Raises:
          OSError: it does not answer.
        """
        context = ssl.create_default_context(cafile=str(self.authority.cert))
        url = f"https://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=20, context=context) as page:
            lines = page.read().decode().splitlines()
        found = {
            name.removeprefix("jblock_"): float(value)
            for name, value in (x.rsplit(" ", 1) for x in lines if x[:1] not in ("#", ""))
            if "{" not in name
        }
        for name, pid in (("server", self.pid), ("engine", self.engine_pid())):
            if pid is None:
                continue
            found[f"{name}_bytes"] = resident(pid)
            found[f"{name}_threads"] = len(os.listdir(f"/proc/{pid}/task"))
            found[f"{name}_files"] = len(os.listdir(f"/proc/{pid}/fd"))
        return found

    def tracebacks(self) -> list[str]:
        """What its logs say where they have a traceback."""
        texts = (log.read_text(errors="replace") for log in self.folder.glob("server-*.log"))
        return [
            text[max(0, text.index(_TRACEBACK) - 500) :] for text in texts if _TRACEBACK in text
        ]

    def logged(self) -> tuple[int, int]:
        """Lines of its request log, and how many of them end a request that another has ended. A line that a
        kill cut off is none."""
        seen: set[str] = set()
        lines = twice = 0
        log = self.folder / "requests.jsonl"
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            with contextlib.suppress(ValueError):
                number = json.loads(line)["request_id"]
                lines, twice = lines + 1, twice + (number in seen)
                seen.add(number)
        return lines, twice


_TRACEBACK = "Traceback (most recent"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]
