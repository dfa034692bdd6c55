"""Updates under load: of model servers, of the gateway, and of what stands behind both. No request may fail."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.e2e.load import tokens
from tests.kubernetes.cluster import Cluster, Network
from tests.kubernetes.conftest import missing
from tests.kubernetes.rolling import CONCURRENCY, RETURN, Rolled, Streams, finished, gone
from tests.kubernetes.served import NAME
from tests.system import until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def rolled(
    network: Network, inside: None, shared_cluster: Cluster, defined: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rolled]:
    assert not (reason := missing("kube-controller-manager", "envoy-gateway", "helm")), reason
    made = Rolled(shared_cluster, network, tmp_path_factory.mktemp("rolled"))
    yield made
    made.close()


def test_a_models_deployment_is_rolled_under_load_and_no_request_fails(rolled: Rolled) -> None:
    path = rolled.model("rolls", 3)
    old = rolled.kubelet.of("rolls")
    with rolled.load("rolls") as load:
        streams = Streams("rolls", 6, 500)
        rolled.roll(path)
        until(partial(rolled.is_rolled, path), "the model is rolled")
        # Each old pod is there until its streams have ended.
        until(lambda: gone(old.values()), "the old pods are gone")
        load.calm()
        load.pods.clear()
        until(lambda: load.pods.keys() == rolled.kubelet.of("rolls").keys(), "each new pod answers, and nobody else")
        load.more(100)
    assert load.wrong == []
    assert all(finished(streams.ends()))
    assert load.pods.keys() == rolled.kubelet.of("rolls").keys()


def test_the_gateways_deployment_is_rolled_under_load_and_no_request_fails(rolled: Rolled) -> None:
    rolled.model("steady", 2)
    old, controlled = rolled.kubelet.of(NAME).values(), rolled.holder()
    written = rolled.generations()
    with rolled.load("steady", user="tenant") as load:
        streams = Streams("steady", 4, 900, user="tenant")
        rolled.update()
        until(lambda: all(pod.signalled for pod in old), "the old gateways are told to go")
        assert streams.going == 4
        until(partial(rolled.is_rolled, rolled.deployed), "the gateway is rolled")
        ends = streams.ends()
        until(lambda: gone(old), "the old gateways are gone")
        load.more(100)
    assert load.wrong == []
    assert all(finished(ends))
    # The new ones control, and have found nothing to change.
    assert rolled.holder() not in ("", controlled)
    assert rolled.generations() == written
    # Each was charged once, and what it used.
    used = (load.answered + len(ends), load.tokens + sum(map(tokens, ends)))
    until(lambda: rolled.usage("tenant") == used, f"usage is {used}")
    # Nothing counts as running any more.
    again = Streams("steady", CONCURRENCY, 100, user="tenant")
    assert rolled.chat("steady", user="tenant").status == 429
    assert all(finished(again.ends()))


def test_a_model_is_scaled_to_nothing_and_back_under_load(rolled: Rolled) -> None:
    path = rolled.model("scaled", 2)
    with rolled.load("scaled", refusals=["no_ready_pods", "model_not_found"]) as load:
        streams = Streams("scaled", 4, 200)
        rolled.scale(path, 0)
        until(lambda: not rolled.kubelet.of("scaled"), "no pod is left")
        rolled.until_chat("scaled", 404)
        assert all(finished(streams.ends()))
        rolled.scale(path, 2)
        rolled.until_chat("scaled", 200)
        until(partial(rolled.is_rolled, path), "it is back")
        load.calm()
        refused = load.refused
        load.more(100)
    assert load.wrong == []
    assert load.refused == refused > 0


def test_a_node_goes_without_a_word_and_only_streams_that_had_begun_there_fail(rolled: Rolled) -> None:
    path = rolled.model("survives", 3)
    with ThreadPoolExecutor(9) as threads:
        asked = [threads.submit(rolled.chat, "survives", max_tokens=150) for _ in range(9)]
        streams = Streams("survives", 9, 200)
        until(lambda: rolled.running("survives") == 18, "all are with the pods")
        lost = streams.pods[0]
        pod = rolled.kubelet.of("survives")[lost]
        rolled.kubelet.lose(pod)
        until(lambda: rolled.left_out(lost), "the gateways have noticed")
        with rolled.load("survives") as load:
            # What it had been asked, and had not begun to answer, another pod is asked once Envoy has noticed, too.
            assert [each.result().status for each in asked] == [200] * 9
            assert finished(streams.ends()) == [each != lost for each in streams.pods]
            rolled.api.gone(pod.path)
            until(partial(rolled.is_rolled, path), "there are three again")
            load.more(100)
    assert load.wrong == []


def test_a_gateway_that_is_killed_costs_at_most_what_it_was_deciding_then(rolled: Rolled) -> None:
    rolled.model("decided", 2)
    with rolled.load("decided") as load:
        streams = Streams("decided", 4, 200)
        pod = min(rolled.kubelet.of(NAME).items())[1]
        pod.kill()
        until(lambda: pod.told is False, "it is known")
        load.more(200)
        assert all(finished(streams.ends()))
    # Between its two replies Envoy does not ask another one (decision 0009); there is one such moment for a client.
    assert len(load.wrong) <= 2, load.wrong
    until(partial(rolled.is_rolled, rolled.deployed), "there are two again")


def test_traffic_goes_on_while_the_control_plane_is_away_and_all_converges_after(rolled: Rolled) -> None:
    path = rolled.model("goes-on", 2)
    with rolled.load("goes-on", streams=False) as load:
        rolled.eg.process.kill()
        rolled.cluster.kill("kube-apiserver")
        load.more(200)
        streams = Streams("goes-on", 6, 200)
        # Nobody hears of a server that dies meanwhile, but for the gateway.
        dead = streams.pods[0]
        rolled.kubelet.of("goes-on")[dead].kill()
        load.more(200)
        rolled.cluster.start_api()
        rolled.eg.start()
        rolled.scale(path, 4)
        until(partial(rolled.is_rolled, path), "it has grown", RETURN)
        rolled.model("new-after", 1)
        load.calm()
        load.pods.clear()
        # Also where it is the last to be heard of by one of the gateways, or by Envoy.
        until(lambda: load.pods.keys() == rolled.kubelet.of("goes-on").keys(), "each pod answers", RETURN)
        load.more(200)
        assert load.pods.keys() == rolled.kubelet.of("goes-on").keys()
    assert load.wrong == []
    assert finished(streams.ends()) == [pod != dead for pod in streams.pods]
