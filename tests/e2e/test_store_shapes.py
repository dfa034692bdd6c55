"""A gateway whose store is a cluster, or has Sentinels, through the real Envoy."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.sentinel import Sentinels
from tests.system import Reply, System, request, until

#: Long enough for a minute's window, for two gateways' worth of waiting, and for Sentinels to agree.
DEADLINE = 30.0


def config(url: str) -> dict[str, Any]:
    members = [{"name": f"member-{number}", "rpm": 3, "team": "crew"} for number in range(8)]
    alone = [{"name": f"alone-{number}", "rpm": 2} for number in range(12)]
    return {
        "store": {"url": url},
        "users": [*members, *alone],
        "teams": [{"name": "crew", "rpm": 10}],
        "limits": {"on_store_failure": "local"},
    }


def store_of(system: System) -> dict[str, Any]:
    found: dict[str, Any] = request(system.admin_port, "GET", "/readyz").json["parts"]["store"]
    return found


def made(system: System, user: str, **record: Any) -> Reply:
    return request(system.admin_port, "PUT", f"/admin/users/{user}", json.dumps(record).encode())


def at_once(system: System, users: list[str]) -> Counter[int]:
    with ThreadPoolExecutor(16) as pool:
        return Counter(reply.status for reply in pool.map(lambda user: system.chat(user=user), users))


@pytest.fixture(scope="module")
def clustered() -> Iterator[tuple[System, Cluster]]:
    cluster = Cluster()
    try:
        cluster.start()
        with System(config=config(cluster.url), store=False) as system:
            yield system, cluster
    finally:
        cluster.stop()


def test_in_a_cluster_a_team_shares_its_limit(clustered: tuple[System, Cluster]) -> None:
    system, _ = clustered
    assert store_of(system)["mode"] == "ok"
    members = [f"member-{number}" for number in range(8)]
    statuses = at_once(system, members * 3)
    assert set(statuses) == {200, 429}
    assert statuses[200] <= 10
    # What was refused for a moment fits now; then the team is full.
    left = [system.chat(user=member).status for member in members * 2]
    assert statuses[200] + left.count(200) == 10
    refusal = system.chat(user="member-7")
    assert refusal.status == 429
    assert "crew" in refusal.json["error"]["message"] or "member-7" in refusal.json["error"]["message"]


def test_in_a_cluster_users_and_usage_are_kept(clustered: tuple[System, Cluster]) -> None:
    system, _ = clustered
    assert made(system, "carol", rpm=1).status == 201
    until(lambda: system.chat(user="carol").status == 429, "carol has a limit", DEADLINE)
    report = request(system.admin_port, "GET", "/admin/usage?user=carol&by=user").json
    assert report["total"]["requests"] >= 1
    assert report["total"]["refused"] >= 1


def test_a_node_that_stands_still_is_shown_and_stops_nobody(clustered: tuple[System, Cluster]) -> None:
    system, cluster = clustered
    beats = cluster.owner("gw:1:gateways")
    node = next(each for each in cluster.nodes if each is not beats)
    users = [f"alone-{number}" for number in range(12)]
    there = [user for user in users if cluster.owner(f"{{user:{user}}}") is node]
    assert there
    node.pause()
    try:
        began = time.monotonic()
        assert at_once(system, users) == {200: 12}
        assert time.monotonic() - began < 5
        store = store_of(system)
        assert (store["mode"], store["reason"]) == ("ok", "no answer in time")
        assert system.metric("gateway_store_away", reason="no answer in time") == 1
        assert at_once(system, users) == {200: 12}
        assert at_once(system, users) == {429: 12}
    finally:
        node.resume()
    until(lambda: "reason" not in store_of(system), "the node is back", DEADLINE)
    assert at_once(system, users) == {429: 12}
    assert '"event": "a node of the store is away"' in system.gateway.output()
    assert '"event": "a node of the store is back"' in system.gateway.output()


def test_a_failover_stops_nobody_and_forgets_no_user() -> None:
    with Sentinels() as sentinels, System(config=config(sentinels.url), store=False) as system:
        assert made(system, "dave", rpm=100).status == 201
        until(lambda: "x-ratelimit-limit-requests" in system.chat(user="dave").headers, "dave has a limit", DEADLINE)
        assert [system.chat(user="alone-1").status for _ in range(3)] == [200, 200, 429]
        old, new = sentinels.servers
        with old.client() as client:
            assert client.wait(1, 10_000) == 1
        old.kill()
        statuses = at_once(system, ["dave"] * 20)
        assert statuses == {200: 20}
        until(lambda: sentinels.master() == new.port and store_of(system)["mode"] == "ok", "it fails over", DEADLINE)
        assert system.chat(user="alone-1").status == 429
        assert system.chat(user="dave").status == 200
        until(lambda: made(system, "erin", rpm=1).status == 201, "users can be made again", DEADLINE)
        until(lambda: system.chat(user="erin").status == 429, "erin has a limit", DEADLINE)
