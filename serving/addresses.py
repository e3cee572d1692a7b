"""Where a server listens: names and numbers of hosts, IPv6, unix sockets."""

import contextlib
import errno
import os
import socket
import stat


def is_unix(host: str) -> bool:
    """Whether `host` names a unix socket: "unix:PATH"."""
    return host.startswith("unix:")


def address(host: str, port: int) -> str:
    """What to connect to: "host:port", IPv6 numbers in brackets, a unix socket as it is."""
    if is_unix(host):
        return host
    host = host.removeprefix("[").removesuffix("]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_host(field: str, host: str) -> None:
    """Whether one can listen on a host at all.

    Raises:
      ValueError: it is no address of this machine, or no name of one.
    """
    if not host:
        raise ValueError(f"{field}: is empty; give an address such as 127.0.0.1, ::1 or unix:PATH")
    if is_unix(host):
        _check_socket(field, host.removeprefix("unix:"))
        return
    bare = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(bare, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"{field}: {host!r} is no address and no name of a host ({error}); give 127.0.0.1, ::1, 0.0.0.0 "
            "or unix:PATH"
        ) from error
    problem: OSError | None = None
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as one:
                one.bind(where)
            return
        except OSError as error:
            problem = error
    raise ValueError(
        f"{field}: {host!r} is no address of this machine ({problem}); give 127.0.0.1, ::1 or 0.0.0.0"
    )


def why_not(host: str, port: int) -> str:
    """Why one cannot listen on a host that is right, in the words of an error."""
    where = address(host, port)
    if is_unix(host):
        return f"host: cannot listen on {where}; give a path in a folder that may be written"
    bare = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address_ in socket.getaddrinfo(
            bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            try:
                with socket.socket(family, kind, protocol) as one:
                    one.bind(address_)
            except OSError as error:
                if error.errno == errno.EACCES:
                    return f"port: {port} is not for this user; give one from 1024 on"
    return f"port: cannot listen on {where}; free it, or give another (0: any)"


def _check_socket(field: str, path: str) -> None:
    """Removes nothing: grpc takes the place of a socket that nobody listens on."""
    if not path:
        raise ValueError(f"{field}: 'unix:' names no path; give unix:/run/jblock/socket")
    if len(os.fsencode(path)) > 100:
        raise ValueError(f"{field}: the path {path!r} is longer than the 100 bytes of a socket's")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ValueError(f"{field}: {folder!r} is no folder; make it, or name another path")
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
        raise ValueError(f"{field}: {path!r} is there and is no socket; name another path")
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.connect(path)
        except OSError:
            return
    raise ValueError(f"{field}: another server listens on {path!r}; stop it, or name another path")
