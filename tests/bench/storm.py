"""``python -m tests.bench --storm REQUESTS``: whether users are charged what pods served, whatever ends a request.

For each source of usage a gateway of two workers, pods that count what they send, and users with every kind of limit.
A third of the requests is left by its client at a random moment, a tenth of the answers is cut by its pod, and gateways
are killed twice: one worker, and later all there is. Requests come in waves, each of users and a model of its own; a
wave is over within a minute, so that afterwards the windows in the store hold all of it and nothing else. Then four
accounts of it must agree:

- the pods': what each request was sent;
- the clients': what came;
- the gateways': one line of the log for each request that has ended, with what it was charged and why;
- the store's: windows, budgets and leases, and the usage log.

Prompts are made so that the gateway's estimate of them is exact: what is left to differ is output. A request whose
gateway was killed has no line, and may have been charged anything from nothing to its reservation; only requests in
progress at that moment may be such.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from random import Random
from typing import Any, Literal, NamedTuple

import aiohttp
import msgspec

from gateway_extproc.bootstrap import LOG_FLUSH
from gateway_extproc.core.store import LEASE, WINDOW
from tests.bench.report import table
from tests.system import System, request, until

Source = Literal["body", "access_log"]

WAVE, AT_ONCE = 500, 64
#: The output that is set aside, for each source: what each request may have at most, and the default.
RESERVE: dict[Source, str] = {"body": "max", "access_log": "expected"}
#: How many of a hundred clients mean to leave, and how many answers go wrong at the pod. Some who mean to leave are
#: answered sooner.
LEAVE, CUT, FAIL = 55, 10, 2
#: Nano-dollars for a token of prompt and of output: whole ones, so that sums are sums.
INPUT, OUTPUT = 1_000, 3_000
#: Seconds until all that is on its way has arrived; and for how long around a kill it is not known what was told: a
#: settlement waits 10 ms for others, an entry of Envoy's log LOG_FLUSH, and workers end a moment after their parent.
ARRIVES = 10.0
UNTOLD: dict[Source, float] = {"body": 0.05, "access_log": 2 * LOG_FLUSH}
#: Seconds by which a gateway may hear later than its client that a request has ended, at least: on a busy machine it is
#: twice what was seen of those that it did hear of, and as long as an answer took to begin (a gateway that was killed
#: before it got to run again has no word in the former).
BEHIND = 0.5
#: Seconds after which a gateway has told its sums of usage: it does so every second.
REPORTED = 1.5
#: A limit that nothing reaches.
PLENTY = 10**9


def budget(amount: float, unit: str) -> dict[str, Any]:
    return {"amount": amount, "unit": unit, "period": "month"}


ROOMY = [budget(PLENTY, "tokens"), budget(1e6, "usd")]


class Charge(NamedTuple):
    """What a request takes of limits."""

    requests: int = 0
    prompt: int = 0
    output: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.output

    @property
    def cost(self) -> int:
        return self.prompt * INPUT + self.output * OUTPUT


class Asked(msgspec.Struct):
    """One request, and what its client saw of it. ``most`` is the output it allows, ``leaves`` the seconds after which
    its client does, times are unix seconds."""

    id: str
    user: str
    team: str
    body: dict[str, Any]
    fault: str
    prompt: int
    most: int
    leaves: float | None
    began: float = 0.0
    ended: float = 0.0
    answered: float | None = None
    status: int = 0
    whole: bool = False
    received: bytes = b""

    @property
    def stream(self) -> bool:
        return bool(self.body["stream"])

    @property
    def reserved(self) -> Charge:
        return Charge(1, self.prompt, self.most)

    def tokens(self) -> int:
        """Those of a stream that came."""
        events = self.received.split(b"\n\n")[:-1]
        return sum(re.search(rb'"text":"[^"]', event) is not None for event in events)

    def usage(self) -> Charge | None:
        """What the answer itself told."""
        for told in reversed(self.received.split(b"\n\n") if self.stream else [self.received]):
            found = re.search(rb'"usage":(\{.*)', told)
            if found is not None:
                usage, _ = json.JSONDecoder().raw_decode(found[1].decode())
                return Charge(1, usage["prompt_tokens"], usage["completion_tokens"])
        return None


class Ended(NamedTuple):
    """A line of the gateways' log: what a request was charged, and why."""

    at: float
    reason: str
    status: int
    charge: Charge
    estimated: bool


class Scope(NamedTuple):
    """What the store holds of one user, team or model. Budgets are None where it has none of that unit, all of it where
    nobody looked."""

    requests: int | None
    tokens: int | None
    budget_tokens: int | None
    budget_usd: int | None


class Fate(NamedTuple):
    name: str
    why: str


WHOLE = Fate("answered", "what the answer told")
STREAM = Fate("stream cut, or left", "the prompt and what was sent; pods are ahead of what arrives")
PLAIN = Fate("answer cut, or left", "its reservation, for nobody knows what was used")
EARLY = Fate("left before the answer", "its prompt")
FAILED = Fate("pod's error, or cut at once", "nothing, but it counts as a request")
REFUSED = Fate("refused", "nothing")
NOWHERE = Fate("left before it was decided", "nothing; its prompt where Envoy was just told where to")
KILLED = Fate("its gateway was killed", "nothing up to its reservation")
FATES = (WHOLE, STREAM, PLAIN, EARLY, FAILED, REFUSED, NOWHERE, KILLED)


class Sums(msgspec.Struct):
    requests: int = 0
    served: int = 0
    charged: int = 0


class Storm:
    """What ``requests`` requests come to by one source of usage. ``wrong`` says in words what does not agree."""

    def __init__(
        self, source: Source, requests: int, wave: int = WAVE, *, seed: int = 0, patient: bool = False
    ) -> None:
        """``patient``: wait until the leases of what was killed have ended."""
        self.source: Source = source
        self.exact = RESERVE[source] == "max"
        self.patient = patient
        self.wave = wave
        self.waves = -(-requests // wave)
        self.rng = Random(f"{seed} {source}")
        self.wrong: list[str] = []
        self.sums = {fate: Sums() for fate in FATES}
        self.left = self.cut = self.kills = self.held = 0
        self._behind = BEHIND
        self.told: dict[str, Scope] = {}
        #: What each scope must have been charged, at least and at most.
        self.due: dict[str, tuple[Charge, Charge]] = {}
        self._log = 0  # bytes that were read of it
        self._ended: dict[str, Ended] = {}

    # --- the parts ---------------------------------------------------------------------------------------------------

    def users(self, wave: int) -> list[dict[str, Any]]:
        """Every kind of limit, some of them too small for what comes."""
        part = self.wave // 8

        def user(kind: str, **limits: Any) -> dict[str, Any]:
            return {"name": f"{kind}-{wave}", **limits}

        return [
            user("rpm", rpm=part // 2),
            user("tpm", tpm=60 * part),
            user("at-once", concurrency=4),
            user("tokens", budgets=[budget(80 * part, "tokens")]),
            user("dollars", budgets=[budget(80 * part * INPUT / 1e9, "usd")]),
            user("all", rpm=PLENTY, tpm=PLENTY, concurrency=PLENTY, budgets=ROOMY),
            user("one", team=f"team-{wave}", concurrency=6, tpm=PLENTY),
            user("two", team=f"team-{wave}", rpm=PLENTY),
        ]  # fmt: skip

    def config(self) -> dict[str, Any]:
        waves = range(self.waves)
        return {
            "usage": {"source": self.source},
            "limits": {"reserve": RESERVE[self.source]},
            "logging": {"level": "debug", "successes": True},
            "prices": {"*": {"input": INPUT / 1e3, "cached_input": INPUT / 1e3, "output": OUTPUT / 1e3}},
            "users": [user for wave in waves for user in self.users(wave)],
            "teams": [{"name": f"team-{wave}", "concurrency": 10, "budgets": ROOMY} for wave in waves],
            "models": {f"storm-{wave}": {"limits": {"rpm": PLENTY}} for wave in waves},
        }

    def plan(self, wave: int) -> list[Asked]:
        return [self._one(f"storm-{self.source}-{wave}-{number}", wave) for number in range(self.wave)]

    def _one(self, id: str, wave: int) -> Asked:
        rng = self.rng
        user = rng.choice(self.users(wave))
        quarter = rng.randrange(5, 120)
        text = "a" * (4 * quarter + 2)  # with its quotes a whole number of four bytes, as the pod and the prior count
        most, n, stream = rng.randrange(3, 40), 1 + (rng.random() < 0.1), rng.random() < 0.6
        body: dict[str, Any] = {
            "model": f"storm-{wave}", "prompt": text, "max_tokens": most, "n": n, "stream": stream,
        }  # fmt: skip
        if stream and rng.random() < 0.5:
            body["stream_options"] = {"include_usage": True}
        faults, drawn = [], rng.randrange(100)
        if drawn < CUT:
            faults.append(rng.choice(["cut-before", f"cut={rng.randrange(most)}", f"cut={rng.randrange(most)}"]))
        elif drawn < CUT + FAIL:
            faults.append("status=500")
        elif rng.random() < 0.3:
            faults.append(f"tokens={rng.randrange(1, most)}")
        if rng.random() < 0.2:
            faults.append(f"delay={rng.random() * 0.1:.3f}")
        leaves = rng.random() * (0.05 + most / 100) if rng.randrange(100) < LEAVE else None
        return Asked(id, user["name"], user.get("team", ""), body, ";".join(faults), quarter + 1, most * n, leaves)

    # --- the storm ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        models = [word for wave in range(self.waves) for word in ("--model", f"storm-{wave}")]
        with System([[*models, "--gpu", "h100"]] * 2, self.config(), workers=2) as system:
            until(lambda: system.admin("/readyz")["parts"]["workers"]["ready"] == 2, "both workers are ready")
            kills: list[tuple[int, Callable[[], None]]] = [
                (self.waves // 3, lambda: self._kill_worker(system)),
                (2 * self.waves // 3, lambda: self._kill_all(system)),
            ]
            killed = 0.0
            for wave in range(self.waves):
                asked = self.plan(wave)
                down = 0.0
                kill = dict(kills).get(wave)
                began = time.time()
                half = threading.Event()
                with ThreadPoolExecutor(1) as thread:
                    blowing = thread.submit(asyncio.run, self._blow(system, asked, half))
                    if kill is not None:
                        half.wait(ARRIVES)
                        down = killed = time.time()
                        kill()  # here, for what it starts ends with the thread that did
                        self.kills += 1
                    blowing.result()
                self._judge(system, wave, asked, began, down)
            self._all_told(system, killed)

    async def _blow(self, system: System, asked: list[Asked], half: threading.Event) -> None:
        """Ask it all; ``half`` is set on the way."""
        waiting, left = iter(asked), len(asked)

        async def client(session: aiohttp.ClientSession) -> None:
            nonlocal left
            for one in waiting:
                await self._ask(session, system, one)
                left -= 1
                if 2 * left <= len(asked):
                    half.set()

        timeout = aiohttp.ClientTimeout(total=WINDOW)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(client(session) for _ in range(AT_ONCE)))

    async def _ask(self, session: aiohttp.ClientSession, system: System, one: Asked) -> None:
        headers = {"user": one.user, "x-request-id": one.id}
        if one.fault:
            headers["x-sim-fault"] = one.fault
        one.began = time.time()
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with (
                asyncio.timeout(one.leaves),
                session.post(f"{system.url}/v1/completions", json=one.body, headers=headers) as answer,
            ):
                one.answered, one.status = time.time(), answer.status
                async for part in answer.content.iter_any():
                    one.received += part
                one.whole = answer.status == 200
        one.ended = time.time()
        if one.stream and not one.received.endswith(b"data: [DONE]\n\n"):
            one.whole = False

    def _kill_worker(self, system: System) -> None:
        old = system.workers()
        os.kill(old[0], signal.SIGKILL)
        until(lambda: len(system.workers()) == 2 and old[0] not in system.workers(), "another worker")
        until(lambda: system.admin("/readyz")["parts"]["workers"]["ready"] == 2, "it is ready")

    def _kill_all(self, system: System) -> None:
        system.gateway.kill()
        system.gateway.start()
        system.wait_until_served()
        until(lambda: system.admin("/readyz")["parts"]["workers"]["ready"] == 2, "both workers are ready")

    # --- what it came to ---------------------------------------------------------------------------------------------

    def _judge(self, system: System, wave: int, asked: list[Asked], began: float, down: float) -> None:
        """All accounts of a wave."""
        found: list[str] = []

        def agree() -> bool:
            self._read_log(system)
            found[:] = self._differences(system, wave, asked, down)
            return not found

        with contextlib.suppress(AssertionError):
            until(lambda: _rests(system), deadline=ARRIVES)
            until(agree, deadline=ARRIVES)
        took = time.time() - began
        if took >= WINDOW:
            found.append(f"it took {took:.0f} s, and windows hold {WINDOW}: the machine is too slow, or too busy")
        if not _rests(system):
            found.append("something is still in flight")
        self.wrong += [f"wave {wave}: {each}" for each in found]
        served, certain = _served(system), 0
        for one in asked:
            told = served.get(one.id, [])
            self.left += one.leaves is not None and not one.whole and one.status in (0, 200)
            self.cut += "cut" in one.fault and bool(one.status)
            ended = self._ended.get(one.id)
            fate = KILLED if self._uncertain(one, down) else _fate(one, ended)
            sums = self.sums[fate]
            sums.requests += 1
            sums.served += sum(each["prompt"] + each["sent"] for each in told)
            if fate is not KILLED and ended is not None:
                sums.charged += ended.charge.tokens
                certain += ended.charge.tokens
        untold = (self.told[f"model:storm-{wave}"].tokens or 0) - certain
        self.sums[KILLED if down else NOWHERE].charged += untold
        for port in system.pod_ports:
            request(port, "DELETE", "/sim/served")

    def _differences(self, system: System, wave: int, asked: list[Asked], down: float) -> list[str]:
        """What does not agree, in words."""
        wrong: list[str] = []
        least: defaultdict[str, list[Charge]] = defaultdict(list)
        most: defaultdict[str, list[Charge]] = defaultdict(list)
        served = _served(system)
        heard = [self._ended[one.id].at - one.ended for one in asked if one.ended and one.id in self._ended]
        waited = [one.answered - one.began for one in asked if one.answered]
        self._behind = max(BEHIND, 2 * max(heard, default=0.0), max(waited, default=0.0))
        for one in asked:
            ended = self._ended.get(one.id)
            low, high = self._charged(one, ended, down)
            for scope in (f"user:{one.user}", f"team:{one.team}", f"model:storm-{wave}"):
                least[scope].append(low)
                most[scope].append(high)
            if not self._uncertain(one, down) and (why := self._broken(one, ended, served.get(one.id, []))):
                wrong.append(f"{one.id}: {why}: {one}, {ended}, {served.get(one.id)}")
        for scope, charges in least.items():
            if scope == "team:":
                continue
            found = _scope(system, f"{{{scope}}}:*")
            self.told[scope] = found
            self.due[scope] = _sum(charges), _sum(most[scope])
            wrong += _outside(scope, found, *self.due[scope])
        if self.exact:
            wrong += self._over(wave)
        return [*wrong, *self._reported(system, wave, asked, down)]

    def _uncertain(self, one: Asked, down: float) -> bool:
        """Whether a killed gateway may have had this request, or known of its end and not told it yet."""
        if not down:
            return False
        if one.began <= down <= (one.answered or one.ended):  # it was being decided
            return True
        ended = self._ended.get(one.id)
        if ended is None:
            # Envoy may go on telling a gateway that has gone, for as long as it is behind.
            after = self._behind if self.source == "access_log" else UNTOLD[self.source]
            return down - self._behind <= one.ended and one.began <= down + after and one.status != 429
        return abs(ended.at - down) <= UNTOLD[self.source] and ended.status != 429

    def _charged(self, one: Asked, ended: Ended | None, down: float) -> tuple[Charge, Charge]:
        """What the store may have been told of it, at least and at most."""
        charge = ended.charge if ended is not None else Charge()
        if not self._uncertain(one, down):
            if ended is None and not one.status and self.source == "access_log":
                # Left while Envoy was told where to: the prompt is charged, and there is no entry to tell it by.
                return Charge(), Charge(1, one.prompt)
            return charge, charge
        if one.status == 200:  # it was admitted, and its prompt is the least that is ever charged for an answer
            low = Charge(1, one.prompt) if ended is None else Charge(1, charge.prompt, min(charge.output, one.most))
        else:
            low = Charge()
        high = Charge(1, one.prompt, max(one.most, charge.output))
        if one.began <= down <= (one.answered or one.ended):
            # It may have been admitted twice: by the gateway that was killed, and by the one that Envoy asked then.
            high = Charge(2, high.prompt + one.prompt, high.output + one.most)
        return low, high

    def _broken(self, one: Asked, ended: Ended | None, served: list[dict[str, Any]]) -> str:
        """Which rule its end does not keep; "" where it keeps all."""
        if ended is None:
            if one.status not in (0, 429) or served:
                return "nobody says how it ended"
            return ""
        charge = ended.charge
        fate = _fate(one, ended)
        sent = [each["sent"] for each in served]
        if charge.requests and charge.tokens and charge.prompt != one.prompt:
            return "the prompt is not what the pod counted"
        if one.whole and fate is not WHOLE:
            return "its client was answered"
        if fate is WHOLE:
            if len(served) != 1 or not served[0]["end"]:
                return "no pod served it whole"
            told = one.usage()
            if told is not None and one.whole and charge != told:
                return "its answer told something else"
            if ended.estimated and self.source == "access_log":
                return "" if charge.output <= self._by_bytes(sent) else "more than was sent"
            return "" if charge.output == sent[0] else "not what the pod sent"
        if fate is STREAM:
            if self.source == "access_log" and ended.estimated:
                return "" if charge.output <= self._by_bytes(sent) else "more than was sent"
            return "" if one.tokens() <= charge.output <= sum(sent) else "not what was sent"
        if fate is PLAIN:
            reserved = one.most == charge.output if self.exact else charge.output <= one.most
            return "" if reserved else "not its reservation"
        if fate is EARLY:
            return "" if not charge.output and one.status in (0, 502) else "not left before its answer"
        return "" if not charge.tokens else "charged for nothing"

    def _by_bytes(self, sent: Iterable[int]) -> int:
        """Output that bytes of a stream are taken for, at most: its first and last events are larger than others."""
        return 1 + sum(round(1.5 * tokens) + 4 for tokens in sent)

    def _over(self, wave: int) -> Iterator[str]:
        """Limits that are exceeded, where everything is reserved before it is used."""
        for user in self.users(wave):
            found = self.told[f"user:{user['name']}"]
            for limit, used in (("rpm", found.requests or 0), ("tpm", found.tokens or 0)):
                if used > user.get(limit, used):
                    yield f"{user['name']} has {used} of {limit} {user[limit]}"
            for budget in user.get("budgets", ()):
                tokens = budget["unit"] == "tokens"
                spent = found.budget_tokens if tokens else found.budget_usd
                amount = round(budget["amount"] * (1 if tokens else 1e9))
                if (spent or 0) > amount:
                    yield f"{user['name']} has spent {spent} of {amount} {budget['unit']}"

    def _reported(self, system: System, wave: int, asked: list[Asked], down: float) -> Iterator[str]:
        """Where the usage log says something else than the gateways' lines. What a gateway counted in its last second
        is missing there."""
        report = system.admin(f"/admin/usage?model=storm-{wave}&by=user")
        rows = {row["user"]: row for row in report["usage"]}
        for user in self.users(wave):
            row = rows.get(user["name"], defaultdict(int))
            found = Charge(row["requests"], row["prompt_tokens"], row["completion_tokens"])
            lines = [self._ended[one.id] for one in asked if one.user == user["name"] and one.id in self._ended]
            high = _sum(line.charge for line in lines)
            low = _sum(line.charge for line in lines if not down - REPORTED <= line.at <= down + UNTOLD[self.source])
            pairs = zip(low, found, high, strict=True)
            if not all(a <= b <= c for a, b, c in pairs) or row["cost_nano_usd"] != found.cost:
                yield f"the usage log has {dict(row)} of {user['name']}, the lines {low} to {high}"

    def _all_told(self, system: System, killed: float) -> None:
        """After all waves: nothing was corrected wrongly later, and nothing runs any more."""
        for scope, due in self.due.items():
            budgets = _scope(system, f"{{{scope}}}:*")._replace(requests=None, tokens=None)
            self.wrong += [f"later, {wrong}" for wrong in _outside(scope, budgets, *due)]
        leases = _leases(system)
        for lease, ends in leases.items():
            if ends > killed + LEASE + 1:
                self.wrong.append(f"the lease {lease!r} ends {ends - killed:.0f} s after its gateway was killed")
        self.held = len(leases)
        if self.patient:
            with contextlib.suppress(AssertionError):
                until(lambda: not _leases(system), deadline=LEASE + ARRIVES)
            self.wrong += [f"{lease!r} still counts as running" for lease in _leases(system)]
        self.wrong += [f"{key!r} lives for ever" for key in _endless(system)]

    def _read_log(self, system: System) -> None:
        with system.gateway.log.open("rb") as file:
            file.seek(self._log)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._log += len(raw)
                self._read_line(raw)

    def _read_line(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
        except ValueError:
            return
        if line.get("event") == "lines left out" and line["of"] == "request failed":
            self.wrong.append("lines are left out: the storm is too fast to follow")
        id = line.get("request_id", "")
        if not id.startswith("storm-"):
            return
        if id in self._ended and not line["status"] == self._ended[id].status == 429:
            # A refusal takes nothing; where its gateway was killed before Envoy heard of it, another one refuses, too.
            self.wrong.append(f"{id} ended twice: {self._ended[id]} and {line}")
        prompt, output = line.get("prompt_tokens", 0), line.get("output_tokens", 0)
        routed = bool(prompt or output) or line["reason"] == "upstream_error"
        charge = Charge(int(routed), prompt, output)
        at = datetime.fromisoformat(line["timestamp"]).timestamp()
        self._ended[id] = Ended(at, line["reason"], line["status"], charge, line.get("estimated", False))


def _fate(one: Asked, ended: Ended | None) -> Fate:
    if ended is None:
        return REFUSED if one.status == 429 else NOWHERE
    if ended.reason == "ok":
        return WHOLE
    if ended.reason == "cut":
        return STREAM if one.stream else PLAIN
    if ended.reason == "client_gone":
        return EARLY if ended.charge.requests else NOWHERE
    return REFUSED if ended.status == 429 else FAILED


def _sum(charges: Iterable[Charge]) -> Charge:
    found = [*charges]
    return Charge(*(sum(column) for column in zip(*found, strict=True))) if found else Charge()


def _outside(scope: str, found: Scope, low: Charge, high: Charge) -> Iterator[str]:
    for name, value, lowest, highest in (
        ("requests in its window", found.requests, low.requests, high.requests),
        ("tokens in its window", found.tokens, low.tokens, high.tokens),
        ("tokens of its budget", found.budget_tokens, low.tokens, high.tokens),
        ("nano-dollars of its budget", found.budget_usd, low.cost, high.cost),
    ):
        if value is not None and not lowest <= value <= highest:
            due = f"{lowest}" if lowest == highest else f"{lowest} to {highest}"
            yield f"{scope} has {value} {name}, not {due}"


def _served(system: System) -> dict[str, list[dict[str, Any]]]:
    """What pods say they sent, by request."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for port in system.pod_ports:
        for served in request(port, "GET", "/sim/served").json["served"]:
            found[served["id"]].append(served)
    return found


def _scope(system: System, key: str) -> Scope:
    """The store's bytes, read without the gateway's code (their forms: window.lua and spend.lua)."""
    assert system.valkey is not None
    with system.valkey.client() as client:
        raw: Any = client.get(f"gw:1:{key}")
        counters: Any = client.get(f"gw:1:b:{key}") or b""
    requests, tokens = struct.unpack_from("<QQ", raw) if raw else (0, 0)
    budgets: dict[int, int] = {}
    for at in range(0, len(counters), 16):
        budgets[counters[at]] = int.from_bytes(counters[at + 9 : at + 16], "little")
    return Scope(requests, tokens, budgets.get(0), budgets.get(1))


def _leases(system: System) -> dict[bytes, float]:
    """What counts as running, and until when (unix seconds by the store)."""
    assert system.valkey is not None
    found: dict[bytes, float] = {}
    with system.valkey.client() as client:
        now: Any = client.time()
        for key in client.scan_iter("gw:1:c:*"):
            leases: Any = client.zrangebyscore(key, f"({now[0]}", "+inf", withscores=True)
            found |= leases
    return found


def _endless(system: System) -> list[bytes]:
    """Keys of limits that do not go by themselves. What is administered stays."""
    assert system.valkey is not None
    with system.valkey.client() as client:
        return [key for key in client.scan_iter("gw:1:*") if b"{directory}" not in key and client.ttl(key) == -1]


def _rests(system: System) -> bool:
    """No gateway has anything in flight, and no pod works."""
    if system.metric("gateway_requests_in_flight") or any(pod["in_flight"] for pod in system.admin("/admin/pods")):
        return False
    pages = [request(port, "GET", "/metrics").body.decode() for port in system.pod_ports]
    return not any(re.search(r"^vllm:num_requests_(running|waiting)\{.*\} [^0]", page, re.M) for page in pages)


def printed(storms: Iterable[Storm]) -> str:
    """The figures, as docs/limits.md has them."""
    rows = [["usage.source", "requests", "", "served", "charged", "difference", "what is charged"]]
    for storm in storms:
        name: str = storm.source
        for fate, sums in storm.sums.items():
            difference = f"{sums.charged - sums.served:+}" if sums.charged != sums.served else "0"
            rows.append(
                [name, str(sums.requests), fate.name, str(sums.served), str(sums.charged), difference, fate.why]
            )
            name = ""
    return table(rows)


def main(requests: int) -> int:
    """Storm by both sources; 0 where all accounts agree."""
    storms = [Storm(source, requests, patient=True) for source in ("body", "access_log")]
    for storm in storms:
        storm.run()
    print(printed(storms))
    for storm in storms:
        print(
            f"{storm.source}: {storm.left} left by their clients, {storm.cut} cut by pods, gateways killed "
            f"{storm.kills} times, {storm.held} leases still held, {len(storm.wrong)} faults"
        )
        for wrong in storm.wrong[:20]:
            print(wrong[:2000], file=sys.stderr)
    return int(any(storm.wrong for storm in storms))
