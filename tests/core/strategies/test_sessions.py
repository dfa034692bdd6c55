"""Session ids name a pod to whoever has the secret, and nothing to anybody else; sessions stay at their pod."""

from __future__ import annotations

import base64
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_extproc.core.choose import choose
from gateway_extproc.core.fleet import Pod
from gateway_extproc.core.load import Load
from gateway_extproc.core.strategies import Asked, Strategies, sessions
from gateway_extproc.core.strategies.session_affinity import id_for

SECRET = b"secret"


def pods(number: int) -> tuple[Pod, ...]:
    return tuple([Pod(f"pod-{n}", f"10.0.0.{n}:80", Load(), None, "") for n in range(number)])


def pick(candidates: tuple[Pod, ...], session: str, model: str = "m", secret: bytes = SECRET, seed: int = 0) -> Pod:
    mixed = Strategies().named("session-affinity")
    lease = choose(mixed, candidates, 1, Asked(model, session=session, secret=secret), 0.0, Random(seed))
    lease.release(0, 0.0)
    return lease.pod


def made(address: str, model: str = "m", secret: bytes = SECRET, seed: int = 1) -> str:
    return id_for(Asked(model, secret=secret), address, Random(seed))


@given(st.binary(), st.text(), st.text(), st.binary(min_size=sessions.CHANCE, max_size=sessions.CHANCE))
def test_an_id_is_read_as_it_was_written(secret: bytes, model: str, address: str, chance: bytes) -> None:
    name = sessions.name_of(secret, address.encode("utf-8", "replace").decode())
    text = sessions.written(secret, model, name, chance)
    assert sessions.read(secret, model, text) == name
    assert sessions.read(secret + b"2", model, text) is None
    assert sessions.read(secret, model + "2", text) is None


@given(st.text() | st.binary(max_size=64).map(lambda data: base64.urlsafe_b64encode(data).decode()))
def test_what_nobody_made_is_no_id(text: str) -> None:
    assert sessions.read(SECRET, "m", text) is None


@given(st.integers(0, 191))
def test_no_bit_of_an_id_can_be_changed(bit: int) -> None:
    data = bytearray(base64.urlsafe_b64decode(made("10.0.0.1:80")))
    data[bit // 8] ^= 1 << bit % 8
    assert sessions.read(SECRET, "m", base64.urlsafe_b64encode(data).decode()) is None


def test_ids_of_one_pod_have_nothing_in_common() -> None:
    one, other = (base64.urlsafe_b64decode(made("10.0.0.1:80", seed=seed)) for seed in (1, 2))
    assert not any(one[at : at + 4] == other[at : at + 4] for at in range(20))
    assert b"10.0" not in one


def test_a_session_stays_at_the_pod_that_its_id_names_whatever_it_does() -> None:
    candidates = pods(8)
    for pod in candidates:
        session = made(pod.address)
        pod.load.in_flight = 100
        assert {pick(candidates, session, seed=seed) for seed in range(5)} == {pod}


@pytest.mark.parametrize(
    "session", ["chat-42", "", made("10.0.0.1:80", model="other"), made("10.0.0.1:80", secret=b"x")]
)
def test_any_other_id_is_a_clients_own_name(session: str) -> None:
    candidates = pods(50)
    picked = {pick(candidates, session, seed=seed) for seed in range(8)}
    assert len(picked) == (1 if session else len(picked)) > 0
    if session:
        assert len({pick(candidates, session, model=f"m{n}").name for n in range(20)}) > 10


def test_sessions_spread_evenly() -> None:
    candidates = pods(5)
    picked = Counter(pick(candidates, f"chat-{number}").name for number in range(5000))
    assert all(850 < count < 1150 for count in picked.values())  # a fair share is 1000; its deviation 28


def test_a_pod_that_goes_moves_its_own_sessions_and_no_other_and_all_gateways_agree() -> None:
    candidates = pods(6)
    before = {f"chat-{n}": pick(candidates, f"chat-{n}") for n in range(300)}
    left = tuple(pod for pod in candidates if pod.name != "pod-3")
    for session, pod in before.items():
        now = {pick(left, session, secret=secret, seed=seed) for seed, secret in enumerate((b"a", b"b"))}
        assert len(now) == 1
        assert pod.name == "pod-3" or now == {pod}


def test_a_session_whose_pod_is_gone_has_one_new_pod() -> None:
    candidates = pods(6)
    session = made("10.9.9.9:80")
    assert len({pick(candidates, session, seed=seed) for seed in range(8)}) == 1


def test_an_id_is_given_again_while_it_names_its_pod_and_made_anew_when_it_does_not() -> None:
    session = made("10.0.0.1:80")
    asked = Asked("m", session=session, secret=SECRET)
    assert id_for(asked, "10.0.0.1:80", Random(5)) == session
    moved = id_for(asked, "10.0.0.2:80", Random(5))
    assert sessions.read(SECRET, "m", moved) == sessions.name_of(SECRET, "10.0.0.2:80")


def test_without_a_session_the_fewest_requests_decide() -> None:
    candidates = pods(3)
    for pod in candidates[:2]:
        pod.load.in_flight = 1
    assert pick(candidates, "") is candidates[2]
