"""Which models exist, which pods are ready, and which of them an Envoy's requests may be given."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.fleet import (
    MODEL_NAME,
    MODELS_PER_POD,
    TLS,
    Fleet,
    PodSpec,
    usable_names,
)
from gateway_extproc.core.load import HALF_LIFE, Load
from tests.core.playbook import address, pod


def shown(fleet: Fleet, node: str = "") -> dict[str, list[str]]:
    """Each model's ready pods by their letter."""
    models = fleet.view(node).models
    return {model: [chr(int(p.address.split(":")[0][7:])) for p in pods] for model, pods in models.items()}


def fleet_of(*specs: PodSpec) -> Fleet:
    """These pods, polled; those without stated models said that they serve ``m``."""
    fleet = Fleet()
    fleet.configure("file", specs)
    for spec in specs:
        fleet.answered(spec.address, None if spec.models else ["m"])
    return fleet


# --- models and readiness ----------------------------------------------------------------------------------------


def test_a_stated_model_exists_before_its_pod_answers_and_an_asked_one_when_it_does() -> None:
    fleet = Fleet()
    fleet.configure("file", [pod("a", "stated"), pod("b")])
    assert shown(fleet) == {"stated": []}
    assert not fleet.all_polled
    fleet.answered(address("b"), ["asked"])
    assert shown(fleet) == {"stated": [], "asked": ["b"]}
    fleet.answered(address("a"), ["something else"])
    assert shown(fleet) == {"stated": ["a"], "asked": ["b"]}
    assert fleet.all_polled


def test_a_model_exists_while_a_pod_that_last_named_it_remains_configured() -> None:
    fleet = fleet_of(pod("a"), pod("b"))
    fleet.failed(address("a"), "refused")
    fleet.failed(address("b"), "refused")
    assert shown(fleet) == {"m": []}
    fleet.configure("file", [pod("b")])
    assert shown(fleet) == {"m": []}
    fleet.configure("file", [])
    assert shown(fleet) == {}


def test_a_model_that_its_pods_no_longer_name_is_gone() -> None:
    fleet = fleet_of(pod("a"))
    fleet.answered(address("a"), ["other"])
    assert shown(fleet) == {"other": ["a"]}
    fleet.answered(address("a"), None)
    assert shown(fleet) == {}


def test_a_pod_is_ready_while_its_last_poll_succeeded() -> None:
    fleet = fleet_of(pod("a"), pod("b"))
    assert shown(fleet) == {"m": ["a", "b"]}
    fleet.failed(address("a"), "timed out")
    assert shown(fleet) == {"m": ["b"]}
    fleet.answered(address("a"), ["m"])
    assert shown(fleet) == {"m": ["a", "b"]}


def test_a_first_poll_that_fails_has_ended_too() -> None:
    fleet = Fleet()
    fleet.configure("file", [pod("a", "m")])
    fleet.failed(address("a"), "refused")
    assert fleet.all_polled
    (member,) = fleet.members()
    assert (member.ready, member.why) == (False, "refused")
    fleet.failed(address("a"), "timed out")
    assert member.why == "timed out"
    fleet.answered(address("a"), None)
    assert (member.ready, member.why) == (True, "")


def test_news_of_pods_that_are_not_configured_is_nothing() -> None:
    fleet = fleet_of(pod("a"))
    version = fleet.version
    fleet.answered(address("z"), ["m"])
    fleet.failed(address("z"), "refused")
    assert shown(fleet) == {"m": ["a"]}
    assert fleet.version == version


def test_only_changes_are_told() -> None:
    fleet = Fleet()
    told: list[int] = []
    fleet.on_change = lambda: told.append(fleet.version)
    fleet.configure("file", [pod("a")])
    for _ in range(3):
        fleet.answered(address("a"), ["m"])
    for why in ("refused", "timed out", "refused"):
        fleet.failed(address("a"), why)
    fleet.forget("nobody")
    fleet.forget("file")
    assert told == [1, 2, 3, 4]


def test_a_view_stays_what_it_was() -> None:
    fleet = fleet_of(pod("a"))
    before = fleet.view()
    assert fleet.view() is before
    fleet.failed(address("a"), "refused")
    assert len(before.models["m"]) == 1
    assert fleet.view().models["m"] == ()


# --- membership --------------------------------------------------------------------------------------------------


def test_a_pod_that_stays_keeps_its_load_models_and_readiness_across_changes() -> None:
    fleet = fleet_of(pod("a"), pod("b"))
    (before, _) = fleet.view().models["m"]
    before.load.in_flight = 3
    for spec in (pod("a"), pod("a", api_key="new"), pod("a", tls=TLS()), pod("a", path_prefix="/x")):
        fleet.configure("file", [pod("c"), spec])
        (after,) = fleet.view().models["m"]
        assert after.load is before.load
        assert (after.api_key, after.path_prefix) == (spec.api_key, spec.path_prefix)


def test_a_pod_whose_models_are_now_stated_is_ready_with_the_next_poll() -> None:
    fleet = fleet_of(pod("a"))
    load = fleet.view().models["m"][0].load
    fleet.configure("file", [pod("a", "n")])
    assert shown(fleet) == {"n": []}
    fleet.answered(address("a"), ["m"])
    assert shown(fleet) == {"n": ["a"]}
    assert fleet.view().models["n"][0].load is load
    fleet.configure("file", [pod("a")])
    assert shown(fleet) == {"n": []}
    fleet.answered(address("a"), ["m"])
    assert shown(fleet) == {"m": ["a"]}


def test_a_pod_that_left_and_came_back_starts_anew() -> None:
    fleet = fleet_of(pod("a", "m"))
    load = fleet.view().models["m"][0].load
    fleet.configure("file", [])
    fleet.configure("file", [pod("a", "m")])
    assert shown(fleet) == {"m": []}
    fleet.answered(address("a"), None)
    assert fleet.view().models["m"][0].load is not load


def test_an_address_from_two_sources_is_one_pod_that_the_first_describes() -> None:
    fleet = fleet_of(pod("a", "m", api_key="file"))
    fleet.configure("dns", [pod("a", "m", api_key="dns"), pod("b", "m")])
    fleet.answered(address("b"), None)
    first = fleet.view().models["m"][0]
    assert shown(fleet) == {"m": ["a", "b"]}
    assert first.api_key == "file"
    fleet.configure("file", [pod("a", "m", api_key="again")])
    assert fleet.view().models["m"][0].api_key == "again"
    fleet.forget("file")
    assert shown(fleet) == {"m": ["a", "b"]}
    assert fleet.view().models["m"][0].api_key == "dns"
    assert fleet.view().models["m"][0].load is first.load
    fleet.forget("dns")
    assert shown(fleet) == {}


def test_a_pod_that_its_source_holds_back_gets_no_request_and_keeps_everything_else() -> None:
    free = pod("a")
    held = msgspec.structs.replace(free, held="it is being deleted")
    fleet = fleet_of(free, pod("b"))
    load = fleet.members()[0].load
    fleet.configure("file", [held, pod("b")])
    assert shown(fleet) == {"m": ["b"]}
    assert [(member.ready, member.why) for member in fleet.members()] == [(False, "it is being deleted"), (True, "")]
    assert fleet.endpoints() == {"m": (held, pod("b"))}, "what is in flight there goes on"
    fleet.configure("file", [free, pod("b")])
    assert shown(fleet) == {"m": ["a", "b"]}, "at once: its last poll was good"
    assert fleet.members()[0].load is load


def test_a_pod_that_is_held_back_is_known_when_it_was_polled_meanwhile() -> None:
    held = msgspec.structs.replace(pod("a"), held="not ready")
    fleet = fleet_of(held)
    assert shown(fleet) == {"m": []}
    fleet.failed(held.address, "refused")
    fleet.configure("file", [pod("a")])
    assert (shown(fleet), fleet.members()[0].why) == ({"m": []}, "refused")


def test_another_pod_at_the_same_address_has_nothing_of_the_one_before() -> None:
    one, two = (msgspec.structs.replace(pod("a"), identity=identity) for identity in ("1", "2"))
    fleet = fleet_of(one)
    load = fleet.members()[0].load
    fleet.configure("file", [two])
    assert shown(fleet) == {}
    assert fleet.members()[0].load is not load


def test_a_pod_serves_what_its_source_says_besides_what_it_names() -> None:
    fleet = Fleet()
    fleet.configure("file", [msgspec.structs.replace(pod("a"), also=("base",))])
    assert shown(fleet) == {"base": []}
    fleet.answered(address("a"), ["lora", "base"])
    assert shown(fleet) == {"base": ["a"], "lora": ["a"]}
    fleet.configure("file", [msgspec.structs.replace(pod("a"), also=("other",))])
    assert shown(fleet) == {"other": ["a"], "lora": ["a"]}
    fleet.answered(address("a"), [])
    assert shown(fleet) == {"other": ["a"]}


def test_a_model_exists_by_the_word_of_its_source() -> None:
    fleet = fleet_of(pod("a"))
    fleet.configure("cluster", [], ["m", "pending"])
    assert shown(fleet) == {"m": ["a"], "pending": []}
    assert fleet.endpoints() == {"m": (pod("a"),), "pending": ()}
    fleet.configure("cluster", [])
    assert shown(fleet) == {"m": ["a"]}
    fleet.configure("cluster", [], ["pending"])
    fleet.forget("cluster")
    assert shown(fleet) == {"m": ["a"]}


def test_envoy_is_told_every_configured_pod_ready_or_not() -> None:
    fleet = fleet_of(pod("a", "m", "n"), pod("b", "m"))
    fleet.failed(address("b"), "refused")
    names = {model: [spec.name for spec in specs] for model, specs in fleet.endpoints().items()}
    assert names == {"m": ["pod-a", "pod-b"], "n": ["pod-a"]}


# --- what each Envoy has acknowledged ----------------------------------------------------------------------------


def test_an_envoy_is_offered_what_it_has_acknowledged() -> None:
    fleet = fleet_of(pod("a", "m"), pod("b", "m", "n"))
    fleet.acknowledged("one", {"m": frozenset({address("a")})})
    assert shown(fleet, "one") == {"m": ["a"], "n": []}
    assert shown(fleet, "two") == shown(fleet) == {"m": ["a", "b"], "n": ["b"]}
    fleet.acknowledged("one", {"m": frozenset({address("a"), address("b")}), "n": frozenset({address("b")})})
    assert shown(fleet, "one") == {"m": ["a", "b"], "n": ["b"]}


def test_an_envoy_with_an_older_state_of_a_model_is_not_held_back_on_it() -> None:
    fleet = fleet_of(pod("a", "m"), pod("b", "n"))
    fleet.acknowledged("one", {"m": None})
    assert shown(fleet, "one") == {"m": ["a"], "n": []}


def test_an_envoy_that_is_gone_is_not_held_back() -> None:
    fleet = fleet_of(pod("a", "m"))
    fleet.acknowledged("one", {})
    assert shown(fleet, "one") == {"m": []}
    fleet.disconnected("one")
    fleet.disconnected("never seen")
    assert shown(fleet, "one") == {"m": ["a"]}


def test_acknowledgements_hold_across_changes_of_the_pods() -> None:
    fleet = fleet_of(pod("a", "m"))
    fleet.acknowledged("one", {"m": frozenset({address("a")})})
    fleet.configure("file", [pod("a", "m"), pod("b", "m")])
    fleet.answered(address("b"), None)
    assert shown(fleet, "one") == {"m": ["a"]}
    fleet.failed(address("a"), "refused")
    assert shown(fleet, "one") == {"m": []}


def test_a_view_is_built_once_for_each_state_also_for_envoys_that_are_not_known() -> None:
    fleet = fleet_of(pod("a", "m"))
    fleet.acknowledged("one", {"m": None})
    assert fleet.view("two") is fleet.view("three") is fleet.view()
    view = fleet.view("one")
    fleet.acknowledged("one", {"m": None})
    assert fleet.view("one") is view
    assert fleet.view("one") is not fleet.view()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("poll"), st.sampled_from("abc"), st.booleans()),
            st.tuples(st.just("configure"), st.sampled_from(["file", "dns"]), st.sets(st.sampled_from("abc"))),
            st.tuples(st.just("acknowledge"), st.sampled_from(["one", "two"]), st.sets(st.sampled_from("abc"))),
            st.tuples(st.just("disconnect"), st.sampled_from(["one", "two"]), st.none()),
        ),
        max_size=30,
    )
)
def test_after_any_changes_the_views_are_what_the_rules_say(steps: list[tuple[str, str, object]]) -> None:
    fleet = Fleet()
    sources: dict[str, set[str]] = {}
    ready: set[str] = set()
    known: dict[str, set[str]] = {}
    for kind, name, value in steps:
        if kind == "poll":
            if value:
                fleet.answered(address(name), None)
            else:
                fleet.failed(address(name), "refused")
            configured = set().union(*sources.values())
            ready = ready | {name} & configured if value else ready - {name}
        elif kind == "disconnect":
            fleet.disconnected(name)
            known.pop(name, None)
        else:
            assert isinstance(value, set)
            if kind == "configure":
                fleet.configure(name, [pod(one, "m") for one in sorted(value)])
                sources[name] = value
                ready &= set().union(*sources.values())
            else:
                fleet.acknowledged(name, {"m": frozenset(address(one) for one in value)})
                known[name] = value
        configured = set().union(*sources.values())
        for node in ("", "one", "two"):
            expected = ready & known.get(node, configured)
            assert {letter for pods in shown(fleet, node).values() for letter in pods} == expected
            assert set(shown(fleet, node)) == ({"m"} if configured else set())


# --- bounds ------------------------------------------------------------------------------------------------------


def test_names_that_no_header_could_carry_are_left_out() -> None:
    names = ["ok", "", "a\nb", "a\0b", " x", "x ", "x" * MODEL_NAME, "x" * (MODEL_NAME + 1), "ok", "Qwen/Qwen3-8B", "ü"]
    assert usable_names(names) == ("ok", "x" * MODEL_NAME, "Qwen/Qwen3-8B", "ü")


def test_a_pod_that_names_too_many_models_has_the_first_of_them() -> None:
    fleet = fleet_of(pod("a"))
    fleet.answered(address("a"), (f"m{n}" for n in range(10 * MODELS_PER_POD)))
    assert len(shown(fleet)) == MODELS_PER_POD
    assert "m0" in shown(fleet)


def test_pods_stand_in_for_each_other_that_get_the_same_request() -> None:
    specs = [pod("a", "m"), pod("b", "m"), pod("c", "m", api_key="k"), pod("d", "m", path_prefix="/x")]
    a, b, c, d = fleet_of(*specs).view().models["m"]
    assert a.stands_in_for(b)
    assert b.stands_in_for(a)
    assert not a.stands_in_for(c)
    assert not a.stands_in_for(d)


# --- loads -------------------------------------------------------------------------------------------------------


def test_tokens_weigh_half_after_each_half_life() -> None:
    load = Load()
    load.tokens.add(800, 100.0)
    assert load.tokens.read(100.0) == 800
    assert load.tokens.read(100.0 + HALF_LIFE) == pytest.approx(400)
    load.tokens.add(100, 100.0 + HALF_LIFE)
    assert load.tokens.read(100.0 + 3 * HALF_LIFE) == pytest.approx(125)


def test_tokens_never_fall_below_zero_nor_grow_when_a_clock_stands_back() -> None:
    load = Load()
    load.tokens.add(10, 100.0)
    assert load.tokens.read(50.0) == 10
    load.tokens.add(-20, 100.0)
    assert load.tokens.read(100.0) == 0
