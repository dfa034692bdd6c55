"""The controller's loop: look at what there is, apply the plan, tell the owners.

Owns following every kind that the plan reads or writes, server-side apply under a field manager of its own, conditions
and events. Promises:

- Level-triggered: each round begins from what there is now, whatever was missed, killed half way or changed by others.
- Nothing is written when nothing has to change; while nothing changes the API server is only watched.
- What belongs to workloads that may not be seen stays as it is, and all others go on.
- Fields that others set stay theirs. Who keeps undoing what we do is told to the owner, and not fought.
- A write that fails is its owner's verdict, and is tried again after a pause that grows; others are not concerned.

Leaves out what should be (plan.py) and who of several does it (lease.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import re
import time
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from random import Random
from typing import Any, Final, Protocol, cast

import msgspec
import structlog

from ..adapters.kubernetes import Reflector
from ..kubernetes_client import FAILURES, Cluster, Refused, content_of, reason
from ..wire.kubernetes import Expired, Metadata, Reflection
from .plan import (
    APPLIED,
    GATEWAY_API,
    GOOD,
    KINDS,
    MANAGER,
    OTHER_GATEWAY,
    WORKLOADS,
    Object,
    Observed,
    Place,
    Reason,
    Settings,
    Template,
    Verdict,
    Workload,
)
from .plan import plan as make_plan

log = structlog.get_logger(__name__)

#: The condition of a Deployment that says whether its model has a route.
CONDITION: Final = "ModelRouted"
#: Seconds that changes are gathered before a round, and between rounds after failures, at least and at most.
GATHER: Final = 0.05
FIRST: Final = 0.5
LONGEST: Final = 30.0
#: How often the same may be written to one object in so many seconds. More, and somebody undoes it each time.
WRITES: Final = 5
WITHIN: Final = 60.0
#: Writes at once.
AT_ONCE: Final = 16
#: Kinds of workloads whose controllers leave a condition of ours alone: the Deployments' keeps those that it does not
#: know, the StatefulSets' does not say.
_KEEP_CONDITIONS: Final = frozenset({"Deployment"})
_APPLY: Final = "application/apply-patch+yaml"
_FORBIDDEN: Final = 403
#: The API server's words for a right that is missing; it refuses with the same code where a quota is used up, or a
#: namespace is being deleted (forbiddenMessage in its handlers/responsewriters).
_LACKS: Final = re.compile(r'cannot \w+ resource "')
#: What a route needs to be there before it leads to a workload.
_BEFORE: Final = ("services", "referencegrants")
_NOT_FOUND: Final = 404
_CONFLICT: Final = 409

Key = tuple[str, str, str]


class Turn(Protocol):
    """Whether it is our turn to write."""

    @property
    def held(self) -> bool: ...


class Always:
    """It is: there is no other."""

    held = True


class _Condition(msgspec.Struct, frozen=True, rename="camel"):
    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


class _WorkloadMetadata(Metadata, frozen=True, rename="camel", kw_only=True):
    creation_timestamp: str = ""


class _Selector(msgspec.Struct, frozen=True, rename="camel"):
    match_labels: dict[str, str] | None = None


class _WorkloadSpec(msgspec.Struct, frozen=True):
    template: Template
    selector: _Selector = _Selector()


class _WorkloadStatus(msgspec.Struct, frozen=True):
    conditions: tuple[_Condition, ...] | None = None


class _WorkloadObject(msgspec.Struct, frozen=True):
    metadata: _WorkloadMetadata
    spec: _WorkloadSpec
    status: _WorkloadStatus = _WorkloadStatus()


_decode: Final = msgspec.json.Decoder(_WorkloadObject).decode


class _Reader:
    """Reads workloads of one kind: those with the label, and those that carry a verdict from when they had it."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, data: bytes) -> Workload | None:
        found = _decode(data)
        condition = next((each for each in found.status.conditions or () if each.type == CONDITION), None)
        told = None
        if condition is not None:
            # Whoever wrote the reason: it is only compared.
            told = Verdict(condition.status == "True", cast(Reason, condition.reason), condition.message)
        made = Workload(
            kind=self._kind,
            metadata=found.metadata,
            created=found.metadata.creation_timestamp,
            selector=found.spec.selector.match_labels or {},
            template=found.spec.template,
            told=told,
            since=(condition.last_transition_time or "") if condition is not None else "",
        )
        return made if made.labelled or told is not None else None


def _object(data: bytes) -> Object:
    """An object of a list or a watch."""
    return _kept(msgspec.json.decode(data, type=dict[str, Any]))


def _kept(found: dict[str, Any]) -> Object:
    """An object without the record of who set which field, which nobody here asks for."""
    found.get("metadata", {}).pop("managedFields", None)
    return found


class Controller:
    """Keeps the routes of a cluster. ``namespaces`` empty: all. ``turn`` says when it may write; whoever changes that
    calls ``wake``."""

    def __init__(
        self, cluster: Cluster, namespaces: Sequence[str], settings: Settings, rng: Random, turn: Turn | None = None
    ) -> None:
        self._cluster = cluster
        self.settings = settings
        self._turn: Turn = Always() if turn is None else turn
        self._rng = rng
        self._changed = asyncio.Event()
        self._told: dict[Key, Verdict | None] = {}
        #: What was written and not yet seen to be there.
        self._written: dict[Place, Object] = {}
        self._writes: dict[Place, tuple[str, list[float]]] = {}
        #: Rounds, and requests that write, since the start.
        self.rounds = 0
        self.requests = 0
        #: Whether the last round left nothing to do, and nothing has changed since.
        self.settled = False
        self._namespaces = list(namespaces) or [""]
        spaces = [f"/namespaces/{name}" if name else "" for name in self._namespaces]
        self._workloads: dict[str, list[Reflector[Workload | None]]] = {
            plural: [
                Reflector(cluster, f"/apis/apps/v1{space}/{plural}", {}, Reflection(_Reader(kind)), self.wake, rng)
                for space in spaces
            ]
            for kind, plural in WORKLOADS.items()
        }
        self._objects: dict[str, list[Reflector[Object]]] = {
            plural: [
                Reflector(cluster, f"{_root(version)}{space}/{plural}", {}, Reflection(_object), self.wake, rng)
                for space in spaces
            ]
            for plural, (version, _) in KINDS.items()
        }
        namespace = settings.gateway.partition("/")[0]
        # All of them: objects may say that they are for another one, which may be gone.
        self._gateways: Reflector[Object] = Reflector(
            cluster,
            f"/apis/{GATEWAY_API}/v1/namespaces/{namespace}/gateways",
            {},
            Reflection(_object),
            self.wake,
            rng,
        )

    def wake(self) -> None:
        """Something may have changed."""
        self.settled = False
        self._changed.set()

    async def run(self) -> None:
        """Follow, and keep the routes, until cancelled."""
        followed: list[Reflector[Any]] = [
            *chain(*self._workloads.values()), *chain(*self._objects.values()), self._gateways,
        ]  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for each in followed:
                group.create_task(each.run(), name=f"follow {each.path}")
            group.create_task(self._rounds(followed), name="keep the routes")

    async def _rounds(self, followed: Sequence[Reflector[Any]]) -> None:
        pause = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause or None):
                    await self._changed.wait()
            self._changed.clear()
            await asyncio.sleep(GATHER)
            if not all(each.answered for each in followed) or not self._turn.held:
                continue
            self._changed.clear()
            failed = await self.round()
            self.settled = not failed and not self._changed.is_set()
            # A failure is tried again also when nothing changes.
            pause = min(max(FIRST, pause * 2), LONGEST) * (0.8 + 0.2 * self._rng.random()) if failed else 0.0
            if failed:
                await asyncio.sleep(min(pause, FIRST))

    # --- one round ---------------------------------------------------------------------------------------------------

    def observe(self) -> Observed:
        """What there is."""
        objects: dict[Place, Object] = {}
        for plural, parts in self._objects.items():
            for part in parts:
                for (namespace, name), each in part.reflection.objects.items():
                    objects[plural, namespace, name] = each
        for place, written in list(self._written.items()):
            there = objects.get(place)
            if _version(written) > (_version(there) if there is not None else 0):
                objects[place] = written
            else:
                del self._written[place]
        workloads = [
            each
            for part in chain(*self._workloads.values())
            if not part.refusal  # what was seen before is no word on what it wants now
            for each in part.reflection.objects.values()
            if each is not None
        ]
        unseen: dict[int, set[tuple[str, str]]] = {}
        every: dict[str, Sequence[Reflector[Any]]] = {**self._objects, **self._workloads}
        for plural, followed in every.items():
            for namespace, reflector in zip(self._namespaces, followed, strict=True):
                if reflector.refusal:
                    unseen.setdefault(reflector.refusal, set()).add((plural, namespace))
        gateways = None
        if not self._gateways.refusal:
            gateways = frozenset(name for _, name in self._gateways.reflection.objects)
        forbidden = frozenset(unseen.get(_FORBIDDEN, ()))
        return Observed(workloads, objects, frozenset(unseen.get(_NOT_FOUND, ())), forbidden, gateways)

    async def round(self) -> bool:
        """Make it so; whether something failed."""
        self.rounds += 1
        observed = self.observe()
        wanted = whole = make_plan(observed, self.settings)
        owners = {each.metadata.uid: each.key for each in observed.workloads}
        #: What went wrong, by whom it is for.
        failures: dict[Key, Verdict] = {}
        lacking: set[Key] = set()
        room = asyncio.Semaphore(AT_ONCE)
        failed = False

        async def write(place: Place, each: Object | None) -> None:
            nonlocal failed
            there = observed.objects.get(place)
            try:
                async with room:
                    if each is not None:
                        await self._apply(place, each)
                    elif there is not None:
                        await self._remove(place, there)
            except (*FAILURES, _Contested) as error:
                failed = True
                if each is None and isinstance(error, Refused) and error.code == _CONFLICT:
                    return  # it has changed since: the next round looks at what it is now
                why = _why(error)
                log.warning("cannot write", kind=place[0], namespace=place[1], name=place[2], error=why)
                keys = [key for uid in _owners(each or there or {}) if (key := owners.get(uid)) is not None]
                told = f"{KINDS[place[0]][1]} {place[2]}{' is to be removed' if each is None else ''}: {why}"
                for key in keys:
                    if each is not None:
                        failures[key] = Verdict(False, _reason(error), told)
                        continue
                    # What is there too long takes no route away.
                    planned = whole.verdicts.get(key)
                    routed = planned is not None and planned.routed
                    failures.setdefault(key, Verdict(routed, _reason(error), told))
                if there is None:
                    lacking.update(keys)

        async def write_all(kinds: Iterable[str]) -> None:
            for kind in kinds:
                await asyncio.gather(*(write(place, each) for place, each in wanted.apply.items() if place[0] == kind))

        # What a route needs comes before it, and goes after it: no request is lost between. A route that led to what
        # could not be made would answer 500 for its share, so it is made without.
        without: set[Key] = set()
        await write_all(_BEFORE)
        while lacking - without:
            without |= lacking
            observed = self.observe()
            rest = [each for each in observed.workloads if each.key not in without]
            wanted = make_plan(msgspec.structs.replace(observed, workloads=rest), self.settings)
            await write_all(_BEFORE)
        await write_all(kind for kind in KINDS if kind not in _BEFORE)
        # What either plan needs stays: the workloads that are left out may have had it before.
        gone = sorted({*whole.delete} & {*wanted.delete})
        for kind in reversed(list(KINDS)):
            await asyncio.gather(*(write(place, None) for place in gone if place[0] == kind))
        verdicts = {**whole.verdicts, **wanted.verdicts, **failures}
        for each in observed.workloads:
            async with room:
                failed |= not await self._tell(each, verdicts.get(each.key))
        here = {each.key for each in observed.workloads}
        self._told = {key: told for key, told in self._told.items() if key in here}
        self._writes = {place: each for place, each in self._writes.items() if place in observed.objects}
        return failed

    async def _apply(self, place: Place, wanted: Object) -> None:
        mark = wanted["metadata"]["annotations"][APPLIED]
        now = time.monotonic()
        before, times = self._writes.get(place, ("", []))
        times = [at for at in times if now - at < WITHIN] if before == mark else []
        if len(times) >= WRITES:
            raise _Contested("somebody keeps changing it back; see its managedFields for who")
        answer = await self._write("PATCH", _path(place), wanted, force=True)
        self._writes[place] = (mark, [*times, now])
        self._written[place] = _kept(content_of(answer))

    async def _remove(self, place: Place, there: Object) -> None:
        # Exactly what was looked at: somebody may have put his own in its place.
        metadata = there["metadata"]
        conditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        body = msgspec.json.encode({"preconditions": conditions})
        self.requests += 1
        try:
            await self._cluster.ask("DELETE", _path(place), body=body)
        except Refused as error:
            if error.code != _NOT_FOUND:
                raise

    async def _write(self, method: str, path: str, content: Any, *, force: bool = False) -> bytes:
        params = {"fieldManager": MANAGER, "fieldValidation": "Strict"} | ({"force": "true"} if force else {})
        kind = _APPLY if method == "PATCH" else "application/json"
        self.requests += 1
        return await self._cluster.ask(method, path, params, body=msgspec.json.encode(content), content_type=kind)

    # --- telling -----------------------------------------------------------------------------------------------------

    async def _tell(self, workload: Workload, verdict: Verdict | None) -> bool:
        """Tell a workload's owner what is new; whether that went well. None: it is none of ours any more."""
        key = workload.key
        keeps = workload.kind in _KEEP_CONDITIONS
        if verdict is not None and verdict.reason == OTHER_GATEWAY:
            keeps = False  # the condition is the other controller's to set
        # What was told by an event: where that is not known, what the condition says was.
        heard = self._told.get(key, workload.told if keeps else None)
        well = True
        # Each by itself: where we may not create Events, there is the condition, and the other way round.
        if verdict is None:
            self._told.pop(key, None)
        elif heard != verdict:
            self._told[key] = heard
            if well := await self._telling(workload, self._event(workload, verdict)):
                self._told[key] = verdict
        if keeps and workload.told != verdict:
            well &= await self._telling(workload, self._condition(workload, verdict))
        return well

    async def _telling(self, workload: Workload, telling: Awaitable[None]) -> bool:
        """Whether that went well."""
        try:
            await telling
        except FAILURES as error:
            if not isinstance(error, Refused) or error.code != _NOT_FOUND:  # else it is gone
                log.warning("cannot tell", workload="/".join(workload.key), error=_why(error))
                return False
        return True

    async def _event(self, workload: Workload, verdict: Verdict) -> None:
        metadata = workload.metadata
        text = f"{metadata.uid} {verdict.routed} {verdict.reason} {verdict.message}"
        now = _now()
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                # Of its content: the same is told once, by however many.
                "name": f"{metadata.name[:200]}.{hashlib.sha256(text.encode()).hexdigest()[:16]}",
                "namespace": metadata.namespace,
            },
            "involvedObject": {
                "apiVersion": "apps/v1",
                "kind": workload.kind,
                "namespace": metadata.namespace,
                "name": metadata.name,
                "uid": metadata.uid,
            },
            "type": "Normal" if verdict.reason in GOOD else "Warning",
            "reason": verdict.reason,
            "message": verdict.message[:1024],
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._write("POST", f"/api/v1/namespaces/{metadata.namespace}/events", event)
        except Refused as error:
            if error.code != _CONFLICT:
                raise

    async def _condition(self, workload: Workload, verdict: Verdict | None) -> None:
        metadata = workload.metadata
        conditions: list[Mapping[str, str]] = []
        if verdict is not None:
            now = _now()
            same = workload.told is not None and workload.told.routed == verdict.routed and workload.since
            conditions.append({
                "type": CONDITION,
                "status": "True" if verdict.routed else "False",
                "reason": verdict.reason,
                "message": verdict.message,
                "lastUpdateTime": now,
                "lastTransitionTime": workload.since if same else now,
            })  # fmt: skip
        wanted = {
            "apiVersion": "apps/v1",
            "kind": workload.kind,
            # With its id: not another of the same name, which an apply would make.
            "metadata": {"name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid},
            "status": {"conditions": conditions},
        }
        path = f"/apis/apps/v1/namespaces/{metadata.namespace}/{WORKLOADS[workload.kind]}/{metadata.name}/status"
        try:
            await self._write("PATCH", path, wanted, force=True)
        except Refused as error:
            if error.code != _CONFLICT:
                raise


class _Contested(Exception):
    """Somebody undoes what we write, each time."""


def _owners(there: Object) -> Iterator[str]:
    """The ids of those that an object is for."""
    for owner in there.get("metadata", {}).get("ownerReferences") or ():
        yield owner["uid"]


def _reason(error: BaseException) -> Reason:
    """Why a write failed, as a verdict's reason."""
    if isinstance(error, _Contested):
        return "Contested"
    lacks = isinstance(error, Refused) and error.code == _FORBIDDEN and _LACKS.search(error.status.message)
    return "NoRights" if lacks else "WriteFailed"


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _path(place: Place) -> str:
    plural, namespace, name = place
    return f"{_root(KINDS[plural][0])}/namespaces/{namespace}/{plural}/{name}"


def _version(there: Object) -> int:
    version = there.get("metadata", {}).get("resourceVersion", "")
    return int(version) if version.isdecimal() else 0


def _why(error: BaseException) -> str:
    if isinstance(error, Expired):
        return "what it was made from is too old"
    return reason(error)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
