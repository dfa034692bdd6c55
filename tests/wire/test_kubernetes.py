"""List and watch without I/O: whatever comes in whatever pieces, the objects are those of a moment that was."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.wire import kubernetes, kubernetes_pods
from gateway_extproc.wire.kubernetes import Broken, Expired, Lines, Reflection, status_of

NAMES = ("a", "b", "c")


def reflection() -> Reflection[Any]:
    def read(data: bytes) -> Any:
        found = json.loads(data)
        if found.get("odd"):
            raise msgspec.DecodeError(found["odd"])
        return found["value"]

    return Reflection(read)


def thing(name: str, version: int, value: object = None, **more: object) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "n", "resourceVersion": str(version)}, "value": value, **more}


def page(*things: object, version: object = "1", following: str = "") -> bytes:
    return json.dumps({"metadata": {"resourceVersion": version, "continue": following}, "items": things}).encode()


def event(kind: str, what: object) -> bytes:
    return json.dumps({"type": kind, "object": what}).encode()


def listed(*things: object, version: str = "1") -> Reflection[Any]:
    made = reflection()
    made.begin()
    assert made.page(page(*things, version=version)) == ""
    return made


def values(of: Reflection[Any]) -> dict[str, Any]:
    return {name: value for (_, name), value in of.objects.items()}


# --- lists -----------------------------------------------------------------------------------------------------------


def test_a_list_of_one_page_holds_at_once() -> None:
    found = listed(thing("a", 3, "x"), thing("b", 2, "y"), version="7")
    assert (values(found), found.version) == ({"a": "x", "b": "y"}, "7")


def test_half_a_list_is_never_seen() -> None:
    found = listed(thing("a", 1, "old"))
    found.begin()
    assert found.page(page(thing("b", 2, "new"), version="9", following="token")) == "token"
    assert (values(found), found.version) == ({"a": "old"}, "")
    assert found.page(page(thing("c", 3, "new"), version="9")) == ""
    assert (values(found), found.version) == ({"b": "new", "c": "new"}, "9")


def test_a_list_that_begins_again_has_nothing_of_the_one_before() -> None:
    found = listed()
    found.begin()
    found.page(page(thing("gone", 2), version="9", following="token"))
    found.begin()
    found.page(page(thing("a", 3, 1), version="10"))
    assert values(found) == {"a": 1}


def test_a_list_may_be_empty_or_null() -> None:
    assert values(listed()) == {}
    found = reflection()
    assert found.page(b'{"metadata": {"resourceVersion": "4"}, "items": null}') == ""
    assert (values(found), found.version) == ({}, "4")


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"metadata": {}, "items": []}', b'{"metadata": {}, "items": {}}', b"<html>", b"\xff"]
)
def test_a_list_that_cannot_be_read_changes_nothing(data: bytes) -> None:
    found = listed(thing("a", 1, "x"))
    found.begin()
    with pytest.raises(Broken):
        found.page(data)
    assert values(found) == {"a": "x"}


def test_an_object_that_cannot_be_read_harms_no_other() -> None:
    found = listed(thing("a", 1, "x"), thing("b", 1, "y", odd=True))
    assert (values(found), found.unreadable) == ({"a": "x"}, 1)
    assert found.feed(event("MODIFIED", thing("a", 2, "z", odd=True)))
    assert values(found) == {}


@pytest.mark.parametrize("odd", [{}, {"metadata": None}, {"metadata": {"name": 7}}, {"metadata": {"name": ""}}, [], 7])
def test_what_has_no_name_harms_no_other(odd: object) -> None:
    found = listed(thing("a", 1, "x"), odd, thing("b", 1, "y"))
    assert (values(found), found.unreadable) == ({"a": "x", "b": "y"}, 1)
    assert found.problem.startswith("an object without a name: ")


#: Anything that JSON can say, with the names of an object's parts among its own.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 9) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["metadata", "name", "labels", "spec", "status", "podIP"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(JSON, max_size=5), st.integers(0, 5))
def test_whatever_else_is_in_a_list_a_pod_in_it_is_found(others: list[object], at: int) -> None:
    found = Reflection(kubernetes_pods.read)
    pod = {"metadata": {"name": "a pod", "namespace": "n"}, "status": {"podIP": "10.0.0.1"}}
    found.begin()
    found.page(page(*others[:at], pod, *others[at:]))
    assert found.objects["n", "a pod"].pods[0].address == "10.0.0.1:8000"


def test_it_is_said_which_object_cannot_be_read_and_why() -> None:
    found = listed(thing("a", 1, "x", odd="a bad thing"))
    assert found.problem == "n/a: a bad thing"


def test_there_is_a_bound_on_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "OBJECTS", 2)
    found = listed(thing("a", 1), thing("b", 1))
    with pytest.raises(Broken, match="more than 2"):
        found.feed(event("ADDED", thing("c", 2)))
    found.begin()
    with pytest.raises(Broken, match="more than 2"):
        found.page(page(*(thing(name, 1) for name in NAMES)))


# --- watches ---------------------------------------------------------------------------------------------------------


def test_events_change_what_there_is_and_say_whether_they_did() -> None:
    found = listed(thing("a", 1, "x"))
    assert found.feed(event("ADDED", thing("b", 2, "y")))
    assert found.feed(event("MODIFIED", thing("a", 3, "z")))
    assert not found.feed(event("MODIFIED", thing("a", 4, "z"))), "nothing that is kept of it changed"
    assert found.feed(event("DELETED", thing("b", 5, "y")))
    assert not found.feed(event("DELETED", thing("b", 6, "y")))
    assert (values(found), found.version) == ({"a": "z"}, "6")


def test_a_bookmark_says_only_how_far_it_is() -> None:
    found = listed(thing("a", 1, "x"))
    assert not found.feed(event("BOOKMARK", {"metadata": {"resourceVersion": "90"}}))
    assert (values(found), found.version) == ({"a": "x"}, "90")


def test_an_event_that_comes_twice_counts_once() -> None:
    found = listed()
    line = event("ADDED", thing("a", 2, "x"))
    assert (found.feed(line), found.feed(line)) == (True, False)


def test_an_event_from_the_past_is_not_believed() -> None:
    found = listed(thing("a", 5, "x"), version="5")
    with pytest.raises(Broken, match="past"):
        found.feed(event("DELETED", thing("a", 4)))
    assert values(found) == {"a": "x"}


def test_versions_that_are_no_numbers_are_not_compared() -> None:
    found = listed(version="x9")
    assert found.feed(event("ADDED", thing("a", 4, 1)))


@pytest.mark.parametrize("status", [{"code": 410}, {"reason": "Expired"}, {"code": 410, "reason": "Gone"}])
def test_a_watch_may_say_that_it_is_too_late(status: dict[str, object]) -> None:
    with pytest.raises(Expired):
        listed().feed(event("ERROR", status))


def test_any_other_error_ends_the_watch_with_its_words() -> None:
    with pytest.raises(Broken, match="etcd is away"):
        listed().feed(event("ERROR", {"code": 500, "message": "etcd is away"}))


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"null", b"\xff", b'{"type": "ADDED"}', event("ADDED", {}), event("ADDED", None), event("BOOKMARK", {}),
        event("ERROR", 7), event("OTHER", thing("a", 9)), event("ADDED", {"metadata": {"name": "a"}}),
    ],
)  # fmt: skip
def test_a_line_that_is_no_event_is_broken(line: bytes) -> None:
    with pytest.raises(Broken):
        listed().feed(line)


@given(st.binary(max_size=200))
def test_any_line_is_an_event_or_broken_and_nothing_else(line: bytes) -> None:
    found = listed(thing("a", 1, "x"))
    with contextlib.suppress(Broken, Expired):
        found.feed(line)
    assert values(found) == {"a": "x"}


@given(st.binary(max_size=200))
def test_any_refusal_can_be_read(data: bytes) -> None:
    assert isinstance(status_of(data).message, str)


#: What happens to the objects of a server, in order: a name, and the value it takes (None: it is deleted).
HISTORY = st.lists(st.tuples(st.sampled_from(NAMES), st.none() | st.integers(0, 3)), max_size=30)


class Server:
    """A server's objects, and every event since the beginning. A change makes a version."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, int]] = {}
        self.events: list[tuple[int, bytes]] = []
        self.version = 1

    def change(self, name: str, value: int | None) -> None:
        self.version += 1
        if value is None:
            if name in self.objects:
                before, _ = self.objects.pop(name)
                self.events.append((self.version, event("DELETED", thing(name, self.version, before))))
            return
        kind = "MODIFIED" if name in self.objects else "ADDED"
        self.objects[name] = (value, self.version)
        self.events.append((self.version, event(kind, thing(name, self.version, value))))

    @property
    def values(self) -> dict[str, int]:
        return {name: value for name, (value, _) in self.objects.items()}

    def list(self) -> bytes:
        things = [thing(name, version, value) for name, (value, version) in self.objects.items()]
        return page(*things, version=str(self.version))


@given(HISTORY, st.integers(0, 30), st.data())
def test_a_list_and_the_events_since_then_are_what_the_server_has(
    history: list[tuple[str, int | None]], at: int, data: st.DataObject
) -> None:
    server, found = Server(), reflection()
    for change in history[:at]:
        server.change(*change)
    found.begin()
    found.page(server.list())
    for change in history[at:]:
        server.change(*change)
    for version, line in server.events:
        if version <= int(found.version):
            continue
        for _ in range(data.draw(st.integers(1, 2), "times")):
            found.feed(line)
        if data.draw(st.booleans(), "bookmark"):
            found.feed(event("BOOKMARK", {"metadata": {"resourceVersion": str(version)}}))
    assert values(found) == server.values


@given(HISTORY, st.randoms(use_true_random=False))
def test_events_in_any_order_give_the_truth_or_a_new_list(history: list[tuple[str, int | None]], random: Any) -> None:
    server, found = Server(), listed()
    for change in history:
        server.change(*change)
    lines = [line for _, line in server.events]
    random.shuffle(lines)
    try:
        for line in lines:
            found.feed(line)
    except Broken:
        found.begin()
        found.page(server.list())
    assert values(found) == server.values


# --- lines -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line and line.strip()), max_size=8), st.data())
def test_lines_are_the_same_however_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10), "cuts"))
    reader, found = Lines(), []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[begin:end])
    assert found == lines


def test_what_has_no_end_is_no_line() -> None:
    reader = Lines()
    assert reader.feed(b"one\n\n  \ntw") == [b"one"]
    assert reader.feed(b"o\n") == [b"two"]


@pytest.mark.parametrize("data", [b"x" * 11, b"x" * 11 + b"\n"])
def test_there_is_a_bound_on_a_line(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "LINE", 10)
    with pytest.raises(Broken, match="longer than 10"):
        Lines().feed(data)
