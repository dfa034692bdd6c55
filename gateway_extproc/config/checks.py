"""Checks across values: what is wrong with values that are right each by itself.

Owns every rule that joins two settings or more: listeners, certificates, time-outs, memory, names that must be unique
or defined. Promises to say nothing that only follows from a problem already reported. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Final

import msgspec

from ..core.address import is_loopback, split_address
from ..core.directory import Limits, User
from ..core.refusal import quoted
from ..core.strategies import mix
from .forms import show_duration, show_size
from .problems import Steps, said
from .schema import POD_SELECTOR, Config

#: A problem: where, and what. The path may be one that the file left out.
Found = Iterator[tuple[Steps, str]]
#: Most budgets of one scope: each is looked at for each request.
MAX_BUDGETS: Final = 16
#: Most namespaces that are watched: a connection each.
NAMESPACES: Final = 64
#: Whether nothing was wrong at, under or above the paths, so that what follows from them is worth saying.
Sound = Callable[..., bool]


def across(config: Config, sound: Sound, strategies: Collection[str]) -> Found:
    """What is wrong with values that are right each by itself. ``sound`` takes any number of paths; ``strategies`` are
    those that there are."""
    yield from _listeners(config, sound)
    yield from _envoy(config, sound)
    if config.limits.bodies_in_memory < config.limits.max_body_bytes and sound(("limits",)):
        least = show_size(config.limits.max_body_bytes)
        yield ("limits", "bodies_in_memory"), f"bodies_in_memory must be at least max_body_bytes ({least})"
    yield from _users(config, sound)
    yield from _limits(config)
    yield from _strategies(config, sound, strategies)
    yield from _models(config, sound)
    yield from _pods(config, sound)
    yield from _kubernetes(config)


def _listeners(config: Config, sound: Sound) -> Found:
    listen, where = config.listen, ("listen", "http")
    if not sound(where):
        return
    host, port = split_address(listen.http)
    if sound(("listen", "grpc")) and not listen.grpc.startswith("unix:") and port:
        other, same = split_address(listen.grpc)
        if port == same and (host == other or {host, other} & {"0.0.0.0", "::"}):
            yield where, f"listen.http and listen.grpc ({listen.grpc}) must differ"
    if sound(("admin",)) and not config.admin.token and not is_loopback(host):
        yield where, f"needs admin.token_file: without a token only this machine is served, got '{host}'"


def _envoy(config: Config, sound: Sound) -> Found:
    tls, where = config.envoy.gateway_tls, ("envoy", "gateway_tls")
    if tls is not None and sound(where) and bool(tls.cert_file) != bool(tls.key_file):
        yield where, "cert_file and key_file need each other"
    given, waits = config.envoy.message_timeout, config.longest_wait
    shortest = config.store.timeout + waits + 1
    if given is not None and given <= shortest and sound(("store", "timeout"), ("models",)):
        parts = "store.timeout, the longest queue_wait" if waits else "store.timeout"
        message = f"must be longer than {parts} and 1s together ({show_duration(shortest)})"
        yield ("envoy", "message_timeout"), message


def _users(config: Config, sound: Sound) -> Found:
    yield from _twice("users", [user.name for user in config.users])
    yield from _twice("teams", [team.name for team in config.teams])
    teams = {team.name for team in config.teams}
    priced = bool(config.prices) or not sound(("prices",))
    for at, user in enumerate(config.users):
        yield from of_user(user, ("users", at), teams if sound(("teams",)) else None, sound, priced=priced)
    for at, team in enumerate(config.teams):
        yield from _budgets(("teams", at), team, priced)


def of_user(user: User, where: Steps, teams: Collection[str] | None, sound: Sound, *, priced: bool) -> Found:
    """What is wrong with a user's record, which stands at ``where``. ``teams`` None: not known; ``priced``: models have
    prices."""
    yield from _budgets(where, user, priced)
    for model, limits in user.per_model.items():
        yield from _budgets((*where, "per_model", model), limits, priced)
    if user.team is not None and teams is not None and user.team not in teams and sound((*where, "team")):
        yield (*where, "team"), f"there is no team '{quoted(user.team)}' in teams"


def _budgets(where: Steps, limits: Limits, priced: bool) -> Found:
    if len(limits.budgets) > MAX_BUDGETS:
        yield (*where, "budgets"), f"expected at most {MAX_BUDGETS}"
    for at, budget in enumerate(limits.budgets):
        if budget.unit == "usd" and not priced:
            yield (*where, "budgets", at, "unit"), "a budget in dollars needs prices, and there are none"
        if budget.wrong is not None:
            yield (*where, "budgets", at, "amount"), budget.wrong


def _strategies(config: Config, sound: Sound, known: Collection[str]) -> Found:
    named: list[tuple[Steps, str]] = [(("routing", "default"), config.routing.default)]
    named += [(("models", name, "strategy"), model.strategy) for name, model in config.models.items() if model.strategy]
    for where, text in named:
        try:
            mix.read(text, known)
        except ValueError:
            if sound(where, ("routing", "strategies")):
                example = "a mix such as prefix-cache:2,least-request:1"
                yield where, f"expected a strategy ({', '.join(known)}) or {example}, got {said(text)}"


def _models(config: Config, sound: Sound) -> Found:
    yield from _names(config, sound)
    for name, model in config.models.items():
        where = ("models", name, "first_byte_timeout")
        first = model.first_byte_timeout
        if first is not None and first >= model.timeout and sound(where, ("models", name, "timeout")):
            yield where, f"must be shorter than timeout ({show_duration(model.timeout)})"


def _names(config: Config, sound: Sound) -> Found:
    models = config.models
    owners: dict[str, str] = {}
    for name, model in models.items():
        for at, alias in enumerate(model.aliases):
            where = ("models", name, "aliases", at)
            if alias in models:
                yield where, f"'{quoted(alias)}' has settings of its own in models, so that it is no alias"
            elif alias in owners:
                yield where, f"'{quoted(alias)}' is an alias of '{quoted(owners[alias])}' already"
            owners.setdefault(alias, name)
    for name, model in models.items():
        targets: list[tuple[Steps, str]] = [(("split", target), target) for target in model.split]
        targets += [(("fallback",), model.fallback)] if model.fallback else []
        for step, target in targets:
            if target in owners:
                yield ("models", name, *step), f"'{quoted(target)}' is an alias; its name is '{quoted(owners[target])}'"
        for target in model.split:
            if target != name and target in models and models[target].split:
                yield ("models", name, "split", target), f"'{quoted(target)}' is split itself"
        if model.split and name not in model.split:
            of_no_effect = msgspec.structs.replace(model, aliases=(), split={}, fallback="")
            if of_no_effect != type(model)() and sound(("models", name)):
                yield (
                    ("models", name),
                    "beside a split only aliases and fallback are of effect: set the rest where it leads",
                )
        seen, last = [name], model.fallback
        while last and last not in seen:
            seen.append(last)
            last = models[last].fallback if last in models else ""
        if last and last == name:
            yield ("models", name, "fallback"), f"leads back to '{quoted(name)}'"


def _limits(config: Config) -> Found:
    if config.limits.default is not None and config.limits.default.budgets:
        why = "names that clients give have no end, and budgets last: only users with a record may have them"
        yield ("limits", "default", "budgets"), why
    for name, model in config.models.items():
        if model.limits is not None:
            yield from _budgets(("models", name, "limits"), model.limits, bool(config.prices))


def _pods(config: Config, sound: Sound) -> Found:
    for at, pod in enumerate(config.pods):
        if bool(pod.address) == bool(pod.dns) and sound(("pods", at, "address"), ("pods", at, "dns")):
            yield ("pods", at), "expected exactly one of 'address' and 'dns'"
        if pod.models is not None and not pod.models and sound(("pods", at)):
            yield ("pods", at, "models"), "expected at least one; leave it out to ask the pod"
    yield from _twice("pods", [pod.address or pod.dns for pod in config.pods])
    yield from _twice("pods", [pod.name for pod in config.pods])


def _kubernetes(config: Config) -> Found:
    found: dict[Steps, tuple[str, ...]] = {}
    if (pods := config.discovery.kubernetes) is not None:
        found["discovery", "kubernetes"] = pods.namespaces
        if pods.pool and (pods.namespaces or pods.selector != POD_SELECTOR):
            yield ("discovery", "kubernetes", "pool"), "expected neither 'namespaces' nor 'selector' beside it"
    if config.controller is not None:
        found["controller",] = config.controller.namespaces
    for where, namespaces in found.items():
        if len(namespaces) > NAMESPACES:
            why = f"expected at most {NAMESPACES}: each is watched by itself (leave it out to watch all at once)"
            yield (*where, "namespaces"), why


def _twice(section: str, names: list[str]) -> Found:
    first: dict[str, int] = {}
    for at, name in enumerate(names):
        if name and first.setdefault(name, at) != at:
            yield (section, at), f"'{quoted(name)}' is there twice (also {section}[{first[name]}])"
