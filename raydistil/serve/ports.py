"""Where a server listens."""

import socket

from raydistil.errors import RaydistilError


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0. Raises RaydistilError where it cannot be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise RaydistilError(
            f"expected a free port to listen on, {host}:{port} is not ({error.strerror}): choose another with --port, "
            f"or --port 0 for any free one"
        ) from error


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def free_or_any(port: int) -> int:
    """`port` on every address of the machine, or any free one where it is in use."""
    try:
        return free_port("0.0.0.0", port)
    except RaydistilError:
        return free_port("0.0.0.0", 0)
