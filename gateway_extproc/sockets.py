"""What every listening socket needs, whatever is spoken on it.

Owns asking whether an address can be listened on, taking away the file that a dead process left of a Unix socket, and
saying why it can't be done. Addresses are ``host:port`` or ``unix:/path``. Leaves out listening itself.
"""

from __future__ import annotations

import errno
import os
import socket
import stat

from .core.address import split_address

#: Seconds for somebody who may listen on a socket to take a connection.
_PATIENCE = 1.0


def reason(error: OSError) -> str:
    """Why listening failed, in the system's words."""
    if error.errno is None or isinstance(error, socket.gaierror):  # whose numbers are of another kind
        return error.strerror or str(error)
    return os.strerror(error.errno)  # not strerror: asyncio writes a sentence of its own there


def try_port(address: str) -> None:
    """Raises OSError where nothing can listen. A Unix socket is not tried."""
    if address.startswith("unix:"):
        return
    host, port = split_address(address)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def free_socket_file(path: str) -> None:
    """Take away what a process that is gone left behind. Raises OSError where somebody listens there."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.EADDRINUSE, "not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PATIENCE)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:
            pass  # such as somebody who is too busy to answer
    raise OSError(errno.EADDRINUSE, "somebody listens")
