"""A TCP hop in front of a server, for tests: it can lose what goes either way, be slow, cut every connection, and lead
elsewhere, as a name or a virtual address does that moves."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress


class Proxy:
    """``port`` is where new connections lead, ``met`` how many there were; ``delay`` the seconds by which answers come
    late."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.port = port
        self._tls = tls
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lose_questions = False
        self.lose_answers = False
        self.bytes_lost = 0
        self.delay = 0.0
        self.met = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0, ssl=self._tls)
        self.own_port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"redis{'s' if self._tls else ''}://127.0.0.1:{self.own_port}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.met += 1
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        for source, sink, name in ((reader, back, "lose_questions"), (there, writer, "lose_answers")):
            pump = asyncio.create_task(self._pump(source, sink, name))
            self._tasks.add(pump)
            pump.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, lose: str) -> None:
        loop = asyncio.get_running_loop()
        due = 0.0
        with suppress(OSError):
            while data := await source.read(65536):
                if getattr(self, lose):
                    self.bytes_lost += len(data)
                elif lose == "lose_answers" and (self.delay or due > loop.time()):
                    due = max(loop.time() + self.delay, due + 1e-6)  # none overtakes another
                    loop.call_at(due, sink.write, data)
                else:
                    sink.write(data)
        sink.transport.abort()
