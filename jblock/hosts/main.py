"""`jblock-agent`: an agent on this host, for a server on another one."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence

# Strangers at the door are no news.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from absl import logging

from jblock.command import program
from jblock.hosts.addresses import rows_address
from jblock.hosts.agent import Agent

_CREDENTIALS = {
    "secret_file": "secret that this agent, the others and the server have",
    "tls_cert_file": "in place of a secret: the certificate of this agent, PEM",
    "tls_key_file": "the private key of it, PEM",
    "tls_ca_file": "the authority of all certificates, PEM",
}


def parser(name: str) -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog=name, description=__doc__, allow_abbrev=False)
    made.add_argument(
        "--listen",
        required=True,
        metavar="HOST:PORT",
        help="where the server connects to; rows of other agents come to the port after it",
    )
    for option, text in _CREDENTIALS.items():
        made.add_argument(f"--{option}", metavar="FILE", help=text)
    made.add_argument(
        "--executable_cache",
        metavar="FOLDER",
        help="folder of compiled programs; default: the user's own",
    )
    made.add_argument(
        "--profiler_port", type=int, help="port of the engine's XLA profiler server; default: none"
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Runs the agent until it is told to stop; returns 0, or 2 on bad configuration."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    given = vars(parser(program(argv[0], "jblock-agent")).parse_args(argv[1:]))
    given = {name: value for name, value in given.items() if value is not None}
    listen = given.pop("listen")
    files = {name: given.pop(name) for name in _CREDENTIALS if name in given}
    try:
        agent = Agent(listen, files, given)
    except (ValueError, OSError) as error:
        print(f"jblock-agent: {error}", file=sys.stderr)
        return 2
    print(f"jblock-agent: listening on {listen}, rows on {rows_address(listen)}", flush=True)
    stop.wait()
    logging.info("told to stop")
    agent.close()
    return 0


def run() -> None:
    """Entry point of `jblock-agent`."""
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
