"""One admin side out of several workers': what each of them shows, as if it were one gateway.

Owns how each number and list is joined. Promises that no counter of the joined page goes back while workers come and
go, so that Prometheus sees one target. Pure: no I/O. Leaves out asking the workers (front.py) and what the numbers
mean (adapters/metrics.py, adapters/admin.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec

#: Gauges of which each worker has its own share. Of the others all speak of the same thing, and the highest holds.
SHARES: Final = frozenset(
    {
        "gateway_requests_in_flight", "gateway_pod_requests_in_flight", "gateway_requests_queued", "gateway_envoys",
        "process_open_fds", "process_resident_memory_bytes", "process_virtual_memory_bytes",
    }
)  # fmt: skip


class Family(msgspec.Struct):
    """A metric: its comment lines, its type, and its samples by name and labels as they stand on the page."""

    comments: list[str]
    gauge: bool
    samples: dict[str, float]


Page = dict[str, Family]


def parse_page(text: str) -> Page:
    """A page as our own metrics.py writes it: each metric's comments before its samples, and no time stamps."""
    page: Page = {}
    for line in text.splitlines():
        if line.startswith("#"):
            _, word, name, *rest = line.split(" ", 3)
            family = page.setdefault(name, Family([], False, {}))
            family.comments.append(line)
            if word == "TYPE":
                family.gauge = rest == ["gauge"]
        elif line:
            sample, _, value = line.rpartition(" ")
            family.samples[sample] = float(value)
    return page


def merge_pages(pages: Iterable[Page]) -> Page:
    """Counters and shares are added; of other gauges the highest holds."""
    merged: Page = {}
    for page in pages:
        for name, family in page.items():
            into = merged.setdefault(name, Family(family.comments, family.gauge, {})).samples
            highest = family.gauge and name not in SHARES
            for sample, value in family.samples.items():
                known = into.get(sample, 0.0)
                into[sample] = max(known, value) if highest else known + value
    return merged


def render_page(page: Page) -> str:
    lines: list[str] = []
    for family in page.values():
        lines += family.comments
        lines += (f"{sample} {value!r}" for sample, value in family.samples.items())
    return "\n".join(lines) + "\n"


class Totals:
    """Pages over time. A worker that ended goes on counting with the last that was seen of it; what it counted after
    that is lost. Bounded by the pages' own bounds."""

    def __init__(self) -> None:
        self._last: dict[int, Page] = {}
        self._ended: Page = {}

    def seen(self, process: int, text: str) -> None:
        self._last[process] = parse_page(text)

    def ended(self, process: int) -> None:
        last = self._last.pop(process, {})
        counters = {name: family for name, family in last.items() if not family.gauge}
        self._ended = merge_pages([self._ended, counters])

    def page(self) -> Page:
        return merge_pages([*self._last.values(), self._ended])


# ------------------------------------------------------------------------------------------------------------- JSON


def _joined(lists: Iterable[Iterable[dict[str, Any]]], key: str, join: Callable[[Any, Any], None]) -> Any:
    """One list of records that are the same where ``key`` is."""
    found: dict[str, dict[str, Any]] = {}
    for records in lists:
        for record in records:
            if record[key] in found:
                join(found[record[key]], record)
            else:
                found[record[key]] = dict(record)
    return list(found.values())


def _join_pod(pod: dict[str, Any], other: dict[str, Any]) -> None:
    pod["in_flight"] += other["in_flight"]
    pod["recent_tokens"] += other["recent_tokens"]
    pod["ready"] = pod["ready"] and other["ready"]
    pod["why"] = pod["why"] or other["why"]
    pod["models"] = list(dict.fromkeys((*pod["models"], *other["models"])))


def _join_model(model: dict[str, Any], other: dict[str, Any]) -> None:
    model["pods"] = max(model["pods"], other["pods"])
    model["ready_pods"] = min(model["ready_pods"], other["ready_pods"])


def merge_pods(answers: Iterable[Any]) -> Any:
    """Loads are added; a pod is ready if it is for every worker."""
    return _joined(answers, "address", _join_pod)


def merge_models(answers: Iterable[Any]) -> Any:
    """A model has as many ready pods as the worker knows that knows fewest: none, where one does not know it yet."""
    lists = list(answers)
    found = _joined(lists, "id", _join_model)
    for model in found:
        if not all(any(each["id"] == model["id"] for each in known) for known in lists):
            model["ready_pods"] = 0
    return sorted(found, key=lambda model: str(model["id"]))


def merge_readiness(answers: Sequence[Any], workers: int, enough: int) -> dict[str, Any]:
    """``answers`` are those of the ``workers`` that gave one. Ready if ``enough`` are; each part as the worst sees
    it."""
    ready = sum(answer["ready"] for answer in answers)
    parts: dict[str, Any] = {"workers": {"configured": workers, "ready": ready}}
    if answers:
        every = [answer["parts"] for answer in sorted(answers, key=lambda answer: bool(answer["ready"]))]
        pods, stores, envoys = ([part[name] for part in every] for name in ("pods", "store", "envoy"))
        parts |= every[0] | {
            "pods": {
                "polled": all(pod["polled"] for pod in pods),
                "configured": max(pod["configured"] for pod in pods),
                "ready": min(pod["ready"] for pod in pods),
            },
            "store": min(stores, key=lambda store: bool(store["ok"])),
            "envoy": {
                "connected": sorted({node for envoy in envoys for node in envoy["connected"]}),
                "refused": sum(envoy["refused"] for envoy in envoys),
            },
            "draining": any(part["draining"] for part in every),
        }
    return {"ready": ready >= enough, "parts": parts}


def merge_overview(answers: Sequence[Any], workers: int, enough: int) -> dict[str, Any]:
    """All that the page shows."""
    requests: dict[str, int] = {}
    for answer in answers:
        for status, count in answer["requests"].items():
            requests[status] = requests.get(status, 0) + count
    return {
        "version": answers[0]["version"],
        "readiness": merge_readiness([answer["readiness"] for answer in answers], workers, enough),
        "requests": dict(sorted(requests.items())),
        "models": merge_models(answer["models"] for answer in answers),
        "pods": merge_pods(answer["pods"] for answer in answers),
    }
