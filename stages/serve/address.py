"""Where a server listens, and whether it answers."""

import errno
import socket
import urllib.error
import urllib.request

from stages.contract.errors import UsageError


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address, so that no other program takes it while weights load. Port 0: a free one.

    Raises UsageError if the port is in use, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"--port {port}: is in use; name another, or end the program that listens there"
            ) from error
        if isinstance(error, PermissionError):
            raise UsageError(f"--port {port}: not permitted; name a port from 1024 on") from error
        raise UsageError(f"--host {host}: {error}; name an address of this machine, such as 127.0.0.1") from error
    return bound


def answers(host: str, port: int) -> bool:
    """Whether a server at this address says that it is healthy."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    try:
        with urllib.request.urlopen(f"http://{name}:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def ready_line(host: str, port: int, names: list[str]) -> str:
    """The line that says where a server can be reached, and what it serves."""
    place = f"[{host}]" if ":" in host else host
    return f"ready at http://{place}:{port}/v1 with {', '.join(names)}"
