"""A small authoritative name server on loopback, for tests: what it knows is a table that a test changes at will.

Owns ``NameServer``. Promises that a change is in the next answer, that a name that is not in the table does not exist,
and that one with no addresses has none. Leaves out everything but A and AAAA over UDP.
"""

from __future__ import annotations

import socketserver
import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset


class NameServer:
    """``with NameServer() as server``. ``address`` is its ``ip:port``; ``ttl``, in seconds, is told with each answer.

    ``asked`` counts questions by name. While ``failing`` is set, the answer to everything is SERVFAIL."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, ttl: int = 0) -> None:
        self.ttl = ttl
        self.failing = False
        self.asked: Counter[str] = Counter()
        self._table: dict[str, tuple[str, ...]] = {}
        answer = self._answer

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, connection = self.request
                connection.sendto(answer(data), self.client_address)

        self._server = socketserver.UDPServer((host, port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="name server")

    @property
    def address(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def set(self, name: str, addresses: Iterable[str]) -> None:
        """From now on the name has exactly these addresses."""
        self._table = {**self._table, name: tuple(addresses)}

    def forget(self, name: str) -> None:
        """From now on there is no such name."""
        self._table = {known: found for known, found in self._table.items() if known != name}

    def _answer(self, data: bytes) -> bytes:
        query = dns.message.from_wire(data)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True).lower()
        self.asked[name] += 1
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA
        addresses = self._table.get(name)
        if self.failing:
            response.set_rcode(dns.rcode.SERVFAIL)
        elif addresses is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            wanted = [each for each in addresses if (":" in each) == (question.rdtype == dns.rdatatype.AAAA)]
            if wanted and question.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
                response.answer.append(dns.rrset.from_text_list(question.name, self.ttl, "IN", question.rdtype, wanted))
        return response.to_wire()

    def __enter__(self) -> NameServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
