"""Addresses of agents: "host:port"."""


def split(address: str, field: str = "agents") -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
      ValueError: it is none.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or (":" in bare and bare == host) or not port.isdecimal():
        raise ValueError(f"{field}: {address!r} is no address; give one like 10.0.0.7:8480")
    if not 0 < int(port) < 65535:
        raise ValueError(
            f"{field}: {address!r}: give a port from 1 to 65534; rows take the next one"
        )
    return bare, int(port)


def rows_address(address: str) -> str:
    """Where rows of other agents come to, of the agent at an address.

    Raises:
      ValueError: it is none.
    """
    host, port = split(address)
    return f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}"
