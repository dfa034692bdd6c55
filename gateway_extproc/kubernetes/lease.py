"""One of several controllers writes: the one that holds a Lease.

Owns taking, renewing and giving back. Promises that whoever holds it knows for how long by its own clock, so that two
never think they do: a holder that could not renew stops before anybody else may begin. Clocks of other machines are
never compared: a Lease is free when it has not changed for as long as it says, as seen from here. Holding it keeps
controllers from working twice; that they do no harm when they do is the plan's (plan.py).
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgspec
import structlog

from ..kubernetes_client import FAILURES, Cluster, Refused, content_of, reason

log = structlog.get_logger(__name__)

#: Seconds, as in client-go's defaults for controllers: how long a Lease holds, how long its holder goes on without
#: having renewed it, and between two tries.
DURATION: Final = 15
DEADLINE: Final = 10.0
RETRY: Final = 2.0
_CONFLICT: Final = 409
_NOT_FOUND: Final = 404


class Lease:
    """The Lease ``namespace/name``, to be held by ``identity``. ``on_change`` is called when that changes."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        name: str,
        identity: str,
        rng: Random,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._name = name
        self._identity = identity
        self._rng = rng
        self._on_change = on_change
        self._clock = clock
        self._until = -1.0
        self._seen: tuple[str, float] = ("", 0.0)
        #: Why it cannot be asked for; empty: it can.
        self.failure = ""

    @property
    def held(self) -> bool:
        return self._clock() < self._until

    async def run(self) -> None:
        """Take it when it is free, and renew it, until cancelled."""
        while True:
            held = self.held
            began = self._clock()
            try:
                async with asyncio.timeout(DEADLINE / 2):
                    mine = await self._try()
            except FAILURES as error:
                why = reason(error)
                if not self.failure:
                    log.warning("cannot ask for the controller's lease", name=self._name, error=why)
                self.failure = why
            else:
                self.failure = ""
                self._until = began + DEADLINE if mine else -1.0
            if self.held != held:
                log.info("controls" if self.held else "another one controls", lease=self._name)
                self._on_change()
            await asyncio.sleep(RETRY * (0.8 + 0.2 * self._rng.random()))

    async def release(self) -> None:
        """Give it back, so that nobody waits for it to run out."""
        if not self.held:
            return
        self._until = -1.0
        try:
            async with asyncio.timeout(1.0):
                found = await self._get()
                if found is not None and found["spec"].get("holderIdentity") == self._identity:
                    await self._put(found, "")
        except FAILURES as error:
            log.debug("the lease runs out by itself", error=reason(error))

    async def _try(self) -> bool:
        """Whether it is ours now."""
        found = await self._get()
        if found is None:
            return await self._create()
        spec, version = found["spec"], found["metadata"]["resourceVersion"]
        holder = spec.get("holderIdentity") or ""
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        ran_out = self._clock() - self._seen[1] > (spec.get("leaseDurationSeconds") or DURATION)
        if holder not in ("", self._identity) and not ran_out:
            return False
        return await self._put(found, self._identity)

    async def _get(self) -> Any:
        try:
            return content_of(await self._cluster.ask("GET", f"{self._path}/{self._name}"))
        except Refused as error:
            if error.code == _NOT_FOUND:
                return None
            raise

    async def _create(self) -> bool:
        lease = {"metadata": {"name": self._name}, "spec": self._spec(self._identity, 0)}
        return await self._write("POST", self._path, lease)

    async def _put(self, found: Any, holder: str) -> bool:
        spec = found["spec"]
        changes = spec.get("leaseTransitions") or 0
        if holder and holder != spec.get("holderIdentity"):
            changes += 1
        fresh = self._spec(holder, changes)
        if holder and holder == spec.get("holderIdentity") and spec.get("acquireTime"):
            fresh["acquireTime"] = spec["acquireTime"]
        # With its version: whoever was faster has it.
        metadata = {"name": self._name, "resourceVersion": found["metadata"]["resourceVersion"]}
        return await self._write("PUT", f"{self._path}/{self._name}", {"metadata": metadata, "spec": fresh})

    async def _write(self, method: str, path: str, lease: Any) -> bool:
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease"} | lease
        try:
            answer = await self._cluster.ask(method, path, body=msgspec.json.encode(lease))
        except Refused as error:
            if error.code == _CONFLICT:
                return False
            raise
        self._seen = (content_of(answer)["metadata"]["resourceVersion"], self._clock())
        return True

    def _spec(self, holder: str, changes: int) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": DURATION if holder else 1,
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": changes,
        }
