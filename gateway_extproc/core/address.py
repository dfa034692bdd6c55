"""Addresses: ``host:port`` in its parts, and back.

Owns the spelling of addresses wherever the project reads or writes one. Promises one canonical form: what
``join_address`` makes of what ``split_address`` gave is read as the same again. Leaves out ``unix:/path``, which has
no parts, and which hosts and ports a setting may have (config/forms.py).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

#: A host name in lower case: labels of at most 63 characters, 253 in all (RFC 1035 section 2.3.4), with the
#: underscores that names of containers may have.
HOST_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
_PORT: Final = re.compile(r"0|[1-9][0-9]{0,4}")


def split_address(text: str) -> tuple[str, int]:
    """``host:port``, ``ip:port`` or ``[v6]:port`` as (host, port): lower case, IP addresses in canonical form, IPv6
    without brackets. Raises ValueError with what was expected."""
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ValueError("expected host:port")
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError("expected a port from 0 to 65535")
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1] if host.endswith("]") else "")), int(port)
        except ValueError:
            raise ValueError("expected an IPv6 address between the brackets") from None
    if ":" in host:
        raise ValueError("expected host:port (an IPv6 address stands in brackets, as in [::1]:8000)")
    host = host.lower()
    try:
        return str(ipaddress.IPv4Address(host)), int(port)
    except ValueError:
        if not HOST_NAME.fullmatch(host) or is_ip(host):
            raise ValueError("expected host:port, with an IP address or a host name") from None
        return host, int(port)


def join_address(host: str, port: int) -> str:
    """The address of a host, as split_address gives it, and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def worker_address(address: str, worker: int) -> str:
    """Where worker ``worker`` of several (from 0) listens, if ``address`` is the first one's: so many ports further
    on, or ``unix:/path-1``, ``unix:/path-2`` after ``unix:/path``. Raises ValueError where there is no such port."""
    if worker == 0:
        return address
    if address.startswith("unix:"):
        return f"{address}-{worker}"
    host, port = split_address(address)
    if port == 0 or port + worker > 65535:
        raise ValueError(f"expected a port from 1 to {65535 - worker}")
    return join_address(host, port + worker)


def is_ip(host: str) -> bool:
    """Whether a host, as split_address gives it, is an IP address and not a name. No name ends in a number, so that
    this needs no parsing (https://url.spec.whatwg.org/#ends-in-a-number-checker)."""
    return ":" in host or host.rpartition(".")[2].isdecimal()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host`` (as split_address gives it)."""
    return ipaddress.ip_address(host).is_loopback if is_ip(host) else host == "localhost"
