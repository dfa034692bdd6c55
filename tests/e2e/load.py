"""Clients for end-to-end tests: closed-loop load beside a test, and single streams that a test reads when it likes.

Owns ``Load`` (some clients that each ask again once they are answered, in a thread of their own, for as long as a
block runs) and ``Stream``. Promises that every answer is judged: its status, and whether it is whole. Leaves out
measuring speed (tests/bench).
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

import aiohttp

#: Seconds after which an answer is not coming any more.
DEADLINE = 60.0
#: Answers that were not as expected, kept for the message of a failed test.
KEPT = 20


def chat(model: str = "your-model-name", *, stream: bool = False, max_tokens: int = 8) -> dict[str, Any]:
    """A request's body."""
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": max_tokens}
    return body | {"stream": True} if stream else body


def tokens(body: bytes) -> int:
    """What an answer says that it took, where a stream was asked to."""
    last = body.rpartition(b'"usage":')[2]
    return int(json.JSONDecoder().raw_decode(last.decode().lstrip())[0]["total_tokens"])


def code(body: bytes) -> str:
    """The code of an error."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return ""


def whole(content_type: str, body: bytes) -> bool:
    """Whether a chat's answer came to its end."""
    if content_type.startswith("text/event-stream"):
        return body.endswith(b"data: [DONE]\n\n")
    try:
        return bool(json.loads(body)["choices"][0]["finish_reason"])
    except (ValueError, LookupError, TypeError):
        return False


class Load:
    """``with Load(url) as load:`` asks all the while. With ``streams``, every other client asks for them. ``pause`` is
    what each client waits, in seconds, before it asks again: it leaves the machine's few cores to what is tested. With
    ``user`` all are that user's, and answers tell their usage. Errors with a code of ``refusals`` are not wrong.

    ``answered`` counts good answers, ``wrong`` tells of the others, ``pods`` counts answers by the pod that gave them,
    ``slowest`` is the longest answer in seconds, ``tokens`` what good answers say that they took, ``refused`` counts
    the errors that are not wrong."""

    def __init__(
        self,
        url: str,
        *,
        clients: int = 16,
        streams: bool = True,
        pause: float = 0.02,
        model: str = "your-model-name",
        max_tokens: int = 8,
        user: str = "",
        refusals: Collection[str] = (),
    ) -> None:
        self._url = f"{url}/v1/chat/completions"
        self._clients = clients
        self._streams = streams
        self._pause = pause
        self._model = model
        self._max_tokens = max_tokens
        self._user = user
        self._refusals = refusals
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")
        self.answered = 0
        self.wrong: list[str] = []
        self.pods: Counter[str] = Counter()
        self.slowest = 0.0
        self.tokens = 0
        self.refused = 0

    def __enter__(self) -> Load:
        self._thread.start()
        self.more(self._clients)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(2 * DEADLINE)
        assert not self._thread.is_alive()

    def more(self, answers: int = 1) -> None:
        """Wait until so many further answers have come, good or not."""
        wanted = self.asked + answers
        end = time.monotonic() + DEADLINE
        while self.asked < wanted:
            assert time.monotonic() < end, f"{self.asked} of {wanted} answers: {self.wrong}"
            time.sleep(0.005)

    def calm(self) -> None:
        """Wait until whatever was asked before this is answered."""
        self.more(2 * self._clients)

    def keep(self, seconds: float) -> None:
        """Go on for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.more()

    @property
    def asked(self) -> int:
        return self.answered + self.refused + len(self.wrong)

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=DEADLINE)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(
                *(self._client(session, stream=self._streams and i % 2 == 1) for i in range(self._clients))
            )

    async def _client(self, session: aiohttp.ClientSession, *, stream: bool) -> None:
        body = chat(self._model, stream=stream, max_tokens=self._max_tokens)
        headers = {}
        if self._user:
            headers["user"] = self._user
            if stream:
                body["stream_options"] = {"include_usage": True}
        while not self._ending.is_set() and len(self.wrong) < KEPT:
            began = time.monotonic()
            try:
                async with session.post(self._url, json=body, headers=headers) as answer:
                    text = await answer.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            if answer.status == 200 and whole(answer.headers.get("content-type", ""), text):
                self.answered += 1
                self.tokens += tokens(text) if self._user else 0
                self.pods[answer.headers.get("x-pod-name", "")] += 1
            elif answer.status >= 400 and code(text) in self._refusals:
                self.refused += 1
            else:
                self.wrong.append(f"{answer.status} {dict(answer.headers)} {text[-300:]!r}")
            await asyncio.sleep(self._pause)


class Stream:
    """One answer as a stream, begun: its status and headers are there, the rest is read when asked for. ``fault`` is
    what the simulated pod does to it; with ``usage`` its end tells what it took. Underscores in a header's name become
    hyphens."""

    def __init__(
        self,
        port: int,
        *,
        max_tokens: int = 8,
        model: str = "your-model-name",
        fault: str = "",
        usage: bool = False,
        **headers: str,
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if fault:
            sent["x-sim-fault"] = fault
        asked = chat(model, stream=True, max_tokens=max_tokens)
        if usage:
            asked["stream_options"] = {"include_usage": True}
        try:
            self._connection.request("POST", "/v1/chat/completions", json.dumps(asked), sent)
            self._answer = self._connection.getresponse()
        except BaseException:
            self.close()
            raise
        self.status = self._answer.status
        self.headers = {name.lower(): value for name, value in self._answer.getheaders()}

    def event(self) -> bytes:
        """The next event."""
        found = b""
        while not found.endswith(b"\n\n"):
            line = self._answer.readline()
            assert line, found
            found += line
        return found

    def rest(self) -> bytes:
        """All that is still to come. Raises http.client.IncompleteRead where it is cut off."""
        try:
            return self._answer.read()
        finally:
            self.close()

    def close(self) -> None:
        """Go away, whatever is still to come."""
        self._connection.close()
