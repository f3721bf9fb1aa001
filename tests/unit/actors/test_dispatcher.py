"""The dispatcher decides from reports and from what it has itself sent since."""

from collections import Counter
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import pytest

from llumnix.actors.dispatcher import DispatcherActor
from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.plugins import POLICIES

READY, DRAINING, STARTING = InstanceState.READY, InstanceState.DRAINING, InstanceState.STARTING


def view(
    states: Iterable[InstanceState],
    loads: Iterable[InstanceLoad] = (),
    draining: Iterable[str] = (),
) -> ClusterView:
    """Instances a-0, b-0, c-0, … of nodes a, b, c, …"""
    infos = {}
    for letter, state in zip("abcdefgh", states, strict=False):
        infos[f"{letter}-0"] = InstanceInfo(f"{letter}-0", letter, "m", state, 1000, 16)
    nodes = {i.node: NodeInfo(i.node, "127.0.0.1:1", "1", 1) for i in infos.values()}
    return ClusterView(
        nodes=MappingProxyType(nodes),
        instances=MappingProxyType(infos),
        loads=MappingProxyType({load.instance: load for load in loads}),
        draining=frozenset(draining),
    )


def dispatcher(policy: str = "load", top_k: int = 1) -> Any:
    return DispatcherActor.start("a", POLICIES[policy], top_k, seed=1).proxy()


def burst(proxy: Any, requests: int, tokens: int = 100) -> Counter[str]:
    answers = [proxy.decide(tokens) for _ in range(requests)]
    return Counter(answer.get(timeout=5.0).instance for answer in answers)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"random"}))
def test_a_burst_is_spread_evenly_before_any_report(policy: str) -> None:
    proxy = dispatcher(policy)
    proxy.update_view(view([READY] * 4)).get(timeout=5.0)
    assert set(burst(proxy, 40).values()) == {10}


def test_random_takes_all() -> None:
    proxy = dispatcher("random")
    proxy.update_view(view([READY] * 4)).get(timeout=5.0)
    assert len(burst(proxy, 100)) == 4


def test_top_k_spreads_among_the_best() -> None:
    loads = [InstanceLoad("a-0", running=5, used_blocks=900)]
    proxy = dispatcher(top_k=3)
    proxy.update_view(view([READY] * 4, loads)).get(timeout=5.0)
    assert set(burst(proxy, 60, tokens=1)) == {"b-0", "c-0", "d-0"}


def test_the_emptier_instance_gets_more() -> None:
    loads = [InstanceLoad("a-0", running=10, used_blocks=700)]
    proxy = dispatcher()
    proxy.update_view(view([READY, READY], loads)).get(timeout=5.0)
    taken = burst(proxy, 20)
    assert taken["b-0"] > taken["a-0"]


def test_only_ready_instances_get_requests() -> None:
    proxy = dispatcher()
    proxy.update_view(view([DRAINING, READY, STARTING, READY, READY], draining=["d-0", "e"])).get(
        timeout=5.0
    )
    assert burst(proxy, 10) == {"b-0": 10}


def test_no_instance_is_no_decision() -> None:
    proxy = dispatcher()
    assert proxy.decide(10).get(timeout=5.0) is None
    proxy.update_view(view([STARTING, DRAINING])).get(timeout=5.0)
    assert proxy.decide(10).get(timeout=5.0) is None


def test_instances_to_avoid() -> None:
    proxy = dispatcher()
    proxy.update_view(view([READY, READY])).get(timeout=5.0)
    for _ in range(5):
        assert proxy.decide(10, 0, frozenset({"a-0"})).get(timeout=5.0).instance == "b-0"
    assert proxy.decide(10, 0, frozenset({"a-0", "b-0"})).get(timeout=5.0) is None


def test_a_decision_names_the_node_and_counts_up() -> None:
    proxy = dispatcher()
    proxy.update_view(view([READY, READY])).get(timeout=5.0)
    decisions = [proxy.decide(10).get(timeout=5.0) for _ in range(6)]
    assert all(d.node == d.instance[0] for d in decisions)
    numbers = [d.sequence for d in decisions]
    assert numbers == sorted(set(numbers))


def test_a_report_takes_over_from_what_is_in_flight() -> None:
    proxy = dispatcher()
    proxy.update_view(view([READY, READY])).get(timeout=5.0)
    sent = [proxy.decide(1600).get(timeout=5.0) for _ in range(8)]
    last = max(d.sequence for d in sent if d.instance == "a-0")
    # a has finished everything that it was sent; of b nothing is known yet.
    done = [InstanceLoad("a-0", received={"a": last})]
    proxy.update_view(view([READY, READY], done)).get(timeout=5.0)
    assert burst(proxy, 3, tokens=100) == {"a-0": 3}
