"""Kubernetes' API server: how it is reached, and asked.

Owns the connection: as the pod that this is, by its service account, or by a kubeconfig. Promises:

- What says how to reach it is read again every REFRESH, and where the server no longer takes our word, or we not its
  certificate: a token or certificate that is replaced on disk is used from then on, and nobody asking notices.
- A pod needs nothing but its service account. kubernetes-asyncio reads kubeconfigs, with the programs and providers
  that they may name; it is an extra, imported only for that, since it takes 0.2 s and 34 MB.
- Whatever is wrong is one of FAILURES, in words for operators, which tell no secret.

Leaves out when to ask, and again (adapters/kubernetes.py, kubernetes/).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import WeakSet

import aiohttp
import msgspec
import structlog

from .core.address import join_address
from .core.refusal import quoted
from .tls import client_context
from .wire.kubernetes import Broken, Expired, Status, status_of

log = structlog.get_logger(__name__)

#: Where a pod has what its service account may use.
ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: The variable of every pod's environment that says where the API server is; its port stands beside it.
HOST: Final = "KUBERNETES_SERVICE_HOST"
#: Seconds without a byte after which an answer is taken for dead. On a watch the API server sends a bookmark every 60
#: to 75 s (bookmarkFrequency in its watch cache).
INACTIVITY: Final = 90.0
#: Seconds for an answer to begin, and for a whole one, such as a page of a list, to come.
ANSWER: Final = 10.0
PAGE_TIME: Final = 30.0
#: Largest answer in bytes: an object, as in wire/kubernetes.py, or a refusal. Lists have a bound of their own.
ANSWER_SIZE: Final = 8 << 20
#: Most bytes that wait unread on a connection before its sender has to: an event of etcd's largest object.
_UNREAD: Final = 2 << 20
#: Seconds after which a token is read again; the kubelet replaces it minutes before it expires. As client-go does it.
REFRESH: Final = 60.0
#: Seconds between two readings because of a refusal: a program may be run for it.
AGAIN: Final = 5.0
#: Seconds that reading may take, which may run a program that asks somebody. It goes on after that, and is not begun
#: a second time meanwhile.
READING: Final = 30.0
#: Turns of the event loop that connections get to end; they take about five.
TURNS: Final = 100
#: Longest complaint of others in characters, as it stands in messages.
WORDS: Final = 300
_GONE: Final = 410
_UNAUTHORIZED: Final = 401
_NOT_FOUND: Final = 404
#: What a URL says of a user, and his password.
_USER: Final = re.compile(r"//[^/@\s]*@")
#: A token, after the word that says of which kind it is, as it can stand in a header.
_AUTHORIZATION: Final = re.compile(r"[A-Za-z]+ [\x21-\x7e]+")


class CannotConnect(Exception):
    """It is not known where the API server is, or who we are; the message is for operators."""


class Refused(Exception):
    """The answer is not what was asked for. ``after``: seconds that we are to leave it alone. ``foreign``: it is not in
    the API server's form, but that of somebody who stands before it."""

    def __init__(self, code: int, status: Status, after: float = 0.0, foreign: bool = False) -> None:
        who = ", and not in the API server's words: something may stand before it" if foreign else ""
        super().__init__(_words(status.message) or f"answered {code}{who}")
        self.code = code
        self.status = status
        self.after = after
        self.foreign = foreign


#: What asking the API server may raise.
FAILURES: Final = (CannotConnect, Refused, Expired, Broken, aiohttp.ClientError, OSError, TimeoutError)


def reason(error: BaseException) -> str:
    """Why asking failed, in words for a log."""
    return _words(str(error)) or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def content_of(answer: bytes) -> dict[str, Any]:
    """The object that an answer is. Raises Broken, which is one of FAILURES."""
    try:
        return msgspec.json.decode(answer, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Broken("an answer cannot be read") from error


def _words(text: str) -> str:
    text = _USER.sub("//…@", " ".join(text.split()))
    return text if len(text) <= WORDS else f"{text[: WORDS - 1]}…"


# --- how it is reached -----------------------------------------------------------------------------------------------


class Access(NamedTuple):
    """How the API server is reached, as it was last read. ``authorization`` may be empty; ``tls`` None: not by TLS."""

    url: str
    authorization: str
    tls: ssl.SSLContext | None
    server_name: str | None = None
    proxy: str | None = None


class Source(Protocol):
    """What says how the API server is reached."""

    async def read(self, *, anew: bool) -> Access:
        """What it says now; ``anew``: nothing that was read before is good enough. Raises CannotConnect."""
        ...


class _Tls:
    """A TLS context as long as its files are the same: connections are kept as long as it is."""

    def __init__(self) -> None:
        self._made_of: object = None
        self._context: ssl.SSLContext | None = None

    def of(
        self, authority: str | None, certificate: str | None = None, key: str | None = None, *, verify: bool = True
    ) -> ssl.SSLContext:
        """``authority`` None: those that the system trusts. Raises OSError."""
        files = [None if file is None else (file, Path(file).read_bytes()) for file in (authority, certificate, key)]
        made_of = (files, verify)
        if self._context is not None and made_of == self._made_of:
            return self._context
        context = client_context(authority, verify=verify)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        self._made_of, self._context = made_of, context
        return context


class _ServiceAccount:
    """The pod that this is."""

    def __init__(self) -> None:
        self._tls = _Tls()

    async def read(self, *, anew: bool) -> Access:
        try:
            host, port = os.environ[HOST], int(os.environ.get("KUBERNETES_SERVICE_PORT") or 443)
            token = (ACCOUNT / "token").read_text(encoding="ascii").strip()
            url = f"https://{join_address(host, port)}"
            return _sound(Access(url, f"Bearer {token}", self._tls.of(str(ACCOUNT / "ca.crt"))))
        except (OSError, ValueError, CannotConnect) as error:
            raise CannotConnect(f"cannot connect to Kubernetes by this pod's service account: {error}") from error


class _Kubeconfig:
    """A kubeconfig, or several that are one, as in KUBECONFIG."""

    def __init__(self, files: str) -> None:
        self._files = files
        self._tls = _Tls()
        #: kubernetes-asyncio's reader. It knows for how long what a program answered is good.
        self._loader: Any = None

    async def read(self, *, anew: bool) -> Access:
        try:
            if not any(map(_exists, self._files.split(os.pathsep))):
                raise CannotConnect("there is no such file")
            return _sound(await self._load(anew=anew))
        except Exception as error:  # a file that is no kubeconfig makes the library stumble over what it expected
            why = _without_secrets(error)
            raise CannotConnect(f"cannot connect to Kubernetes by {self._files}: {why}") from error

    async def _load(self, *, anew: bool) -> Access:
        try:
            from kubernetes_asyncio.client.configuration import Configuration
            from kubernetes_asyncio.config import load_kube_config
        except ImportError as error:
            raise CannotConnect(
                "kubernetes-asyncio is not installed: pip install 'gateway-extproc[kubernetes]'"
            ) from error
        except RuntimeError as error:  # it looks for ~ as it is imported, wherever the file may be
            raise CannotConnect("kubernetes-asyncio needs a home directory: set HOME, to / for instance") from error
        found = Configuration()
        found.host = ""
        if self._loader is None or anew:
            self._loader = await load_kube_config(self._files, client_configuration=found, persist_config=False)
        else:
            await self._loader.load_and_set(found)
        tls = None
        if found.host.startswith("https:"):
            tls = self._tls.of(found.ssl_ca_cert, found.cert_file, found.key_file, verify=bool(found.verify_ssl))
        token = " ".join(found.api_key.get("BearerToken", "").split())
        return Access(found.host, token, tls, found.tls_server_name, found.proxy)


def _exists(file: str) -> bool:
    return bool(file) and os.path.exists(os.path.expanduser(file))


def _sound(access: Access) -> Access:
    """What can be asked by: by the proxy of the environment, where none is named. Raises CannotConnect."""
    for what, url in (("server", access.url), ("proxy-url", access.proxy)):
        if url is not None and not re.match("https?://[^/]", url):
            raise CannotConnect(f"its {what} is no URL")
    if _USER.search(access.url):
        raise CannotConnect("its server names a user, who stands elsewhere")
    if access.authorization and not _AUTHORIZATION.fullmatch(access.authorization):
        raise CannotConnect("its token is empty, or none")
    return access if access.proxy is not None else access._replace(proxy=_proxy_to(access.url))


def _proxy_to(url: str) -> str | None:
    """The proxy that the environment has for a URL."""
    server = urlsplit(url)
    proxy = getproxies().get(server.scheme, "")
    usable = proxy.startswith(("http://", "https://")) and not proxy_bypass(server.netloc)
    return proxy if usable else None


def _without_secrets(error: Exception) -> str:
    """The words of whoever could not read a kubeconfig, of which some quote from it: those name where they were in
    it, in braces. Words of nobody who knew what he read are none for an operator."""
    if not isinstance(error, (CannotConnect, OSError)) and not type(error).__module__.startswith(
        ("kubernetes_asyncio.", "yaml.")
    ):
        return f"it is no kubeconfig ({type(error).__name__})"
    return _words(re.sub(r"\{.*\}", "{…}", str(error), flags=re.DOTALL))


# --- asking ----------------------------------------------------------------------------------------------------------


class Sockets:
    """Those of an aiohttp.ClientSession, which does not wait as it closes for connections whose request was given up:
    TLS's goodbye there takes until the server's."""

    def __init__(self) -> None:
        self._made: WeakSet[socket.socket] = WeakSet()

    def made(self, address: tuple[Any, ...]) -> socket.socket:
        """What connects to an address, as getaddrinfo gives it; a connector's ``socket_factory``."""
        found = socket.socket(*address[:3])
        found.setblocking(False)
        self._made.add(found)
        return found

    async def end(self) -> None:
        """End them at once, and wait until they have. To be called once the session is closed."""
        for each in self._made:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for _ in range(TURNS):
            if all(each.fileno() < 0 for each in self._made):
                break
            await asyncio.sleep(0)


class Cluster:
    """The connection to an API server. ``connect`` makes one; whoever has it closes it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._access: Access | None = None
        self._read_at = 0.0
        self._reading: asyncio.Task[CannotConnect | None] | None = None
        self._sockets = Sockets()
        # As many connections as there are requests: a watch for each path that is followed, and some that write.
        connector = aiohttp.TCPConnector(limit=0, socket_factory=self._sockets.made)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER, sock_read=INACTIVITY)
        # Without what the environment says, which is not only proxies: ~/.netrc would have us be somebody else.
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=_UNREAD)

    @classmethod
    async def connect(cls, kubeconfig: str = "") -> Cluster:
        """By a kubeconfig; where none is named, as the pod that this is, or else by KUBECONFIG or ~/.kube/config.
        Raises CannotConnect."""
        source: Source = _ServiceAccount()
        if kubeconfig or HOST not in os.environ:
            source = _Kubeconfig(kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config")
        made = cls(source)
        try:
            await made._known()
        except BaseException as error:
            await made.close()
            if isinstance(error, TimeoutError):
                raise CannotConnect("cannot connect to Kubernetes: a kubeconfig's program does not answer") from error
            raise
        return made

    async def _known(self, refused: Access | None = None) -> Access:
        """How it is reached, or, where that was ``refused``, how it is now. Raises CannotConnect and TimeoutError."""
        since = asyncio.get_running_loop().time() - self._read_at
        if self._access is None or since > REFRESH or (refused == self._access and since > AGAIN):
            if self._reading is None:
                anew = refused is not None or self._access is None
                self._reading = asyncio.create_task(self._read(anew=anew), name="read how Kubernetes is reached")
            async with asyncio.timeout(READING):
                failed = await asyncio.shield(self._reading)
            if failed is not None and refused is not None:
                raise failed
            if self._access is None:
                raise CannotConnect("nothing is known of Kubernetes") if failed is None else failed
        return self._access

    async def _read(self, *, anew: bool) -> CannotConnect | None:
        """Read it; what went wrong. What was known holds then: it may be good for long, and a file may be missing for
        a moment."""
        try:
            self._access = await self._source.read(anew=anew)
            return None
        except CannotConnect as error:
            if self._access is not None:
                log.warning("goes on with the credentials for Kubernetes that it has", error=str(error))
            return error
        finally:
            self._read_at = asyncio.get_running_loop().time()
            self._reading = None

    async def _request(self, method: str, path: str, access: Access, **more: Any) -> aiohttp.ClientResponse:
        headers = {"accept": "application/json"} | more.pop("headers")
        if access.authorization:
            headers["authorization"] = access.authorization
        if access.server_name:
            more["server_hostname"] = access.server_name
        async with asyncio.timeout(ANSWER):
            return await self._session.request(
                method, access.url + path, headers=headers, allow_redirects=False,
                ssl=True if access.tls is None else access.tls, proxy=access.proxy, **more,
            )  # fmt: skip

    async def _answer(self, method: str, path: str, **more: Any) -> aiohttp.ClientResponse:
        """An answer as it begins; what was refused as we know to ask is asked once more as it may be known now."""
        access = await self._known()
        failed: aiohttp.ClientSSLError | None = None
        try:
            response = await self._request(method, path, access, **more)
        except aiohttp.ClientSSLError as error:
            failed = error
        else:
            if response.status != _UNAUTHORIZED:
                return response
        try:
            fresh = await self._known(refused=access)
        except BaseException:
            if failed is None:
                _hang_up(response)
            raise
        if fresh == access:
            if failed is not None:
                raise failed
            return response
        if failed is None:
            _hang_up(response)
        return await self._request(method, path, fresh, **more)

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask; what comes is read by the caller. Raises FAILURES."""
        headers = {} if body is None else {"content-type": content_type}
        response = await self._answer(method, path, params=params, data=body, headers=headers)
        try:
            if response.status >= 300:
                async with asyncio.timeout(ANSWER):
                    status = status_of(await _read(response, ANSWER_SIZE))
                if response.status == _GONE or status.expired:
                    raise Expired(status.message)
                after = response.headers.get("retry-after", "")
                # It says in plain text that there is no such path, and all else as a Status.
                own = status.code or (response.status == _NOT_FOUND and response.content_type == "text/plain")
                raise Refused(response.status, status, float(after) if after.isdecimal() else 0.0, not own)
            if response.content_type != "application/json":
                kind = quoted(response.content_type)
                raise Broken(f"answered {kind} instead of JSON: it is no API server, or something stands before it")
            yield response
        finally:
            _hang_up(response)

    async def ask(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: bytes | None = None,
        content_type: str = "application/json",
        limit: int = ANSWER_SIZE,
    ) -> bytes:
        """Ask; the whole answer, of at most ``limit`` bytes. Raises FAILURES."""
        async with (
            asyncio.timeout(PAGE_TIME),
            self.stream(method, path, params, body=body, content_type=content_type) as response,
        ):
            return await _read(response, limit)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reading
        await self._session.close()
        await self._sockets.end()


def _hang_up(response: aiohttp.ClientResponse) -> None:
    """Nobody reads on; where there was more to come, the connection is of no use."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()  # TLS's goodbye would have to wait for the server's
    response.close()


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    found = bytearray()
    async for chunk in response.content.iter_any():
        found += chunk
        if len(found) > limit:
            raise Broken(f"an answer is larger than {limit} bytes")
    return bytes(found)
