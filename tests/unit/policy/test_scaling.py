"""The number of instances follows the load: within its limits, in time, and without to and fro."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.policy.capacity import count_instances
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.scaling import Action, Decision, Scaler, ScalingTerms, supply

READY, DRAINING, STARTING = InstanceState.READY, InstanceState.DRAINING, InstanceState.STARTING
BLOCKS = 1000  # of an instance
TERMS = ScalingTerms(low=10, high=60, period=10, cooldown=30, minimum=1, maximum=8, patience=100)


def info(instance: str, state: InstanceState = READY) -> InstanceInfo:
    return InstanceInfo(instance, instance.split("-")[0], "m", state, BLOCKS, 16)


def load(instance: str, running: int, used: int = 0, **but: Any) -> InstanceLoad:
    return InstanceLoad(instance, running, used_blocks=used, **but)


def view(
    infos: Iterable[InstanceInfo],
    loads: Iterable[InstanceLoad] = (),
    limits: Mapping[str, int] | None = None,
    draining: Iterable[str] = (),
    **desired: int,
) -> ClusterView:
    """A cluster whose nodes take four instances each, unless `limits` says otherwise."""
    known = {i.id: i for i in infos}
    nodes = {i.node: 4 for i in known.values()} | dict(limits or {})
    return ClusterView(
        nodes={n: NodeInfo(n, "h:1", "", 1, limit) for n, limit in nodes.items()},
        instances=known,
        loads={each.instance: each for each in loads},
        desired=desired,
        draining=frozenset(draining),
    )


def after(scaler: Scaler, seen: ClusterView, *moments: float) -> Decision | None:
    """What is decided at the last of these moments; nothing at those before."""
    for moment in moments[:-1]:
        assert scaler.decide(seen, moment) is None
    return scaler.decide(seen, moments[-1])


CROWDED = view([info("a-0"), info("b-0")], [load("a-0", 50, 1000), load("b-0", 50, 600)])
IDLE = view([info("a-0"), info("b-0"), info("b-1")], [load("a-0", 1, 10), load("b-0", 2, 20)])


def test_too_little_room_for_a_period_adds_where_the_fewest_are() -> None:
    seen = replace(CROWDED, nodes={**CROWDED.nodes, "c": NodeInfo("c", "h:1", "", 1, 4)})
    scaler = Scaler(TERMS)
    found = after(scaler, seen, 0.0, 9.9, 10.0)
    assert found is not None
    assert (found.action, found.desired, found.victim) == (Action.ADD, {"c": 1}, None)
    assert found.sentence == (
        "adds instances: desired are 1 on c, as the mean freeness is 4.0 blocks a request, and has "
        "been below 10 for 10 s"
    )


def test_what_a_node_was_started_for_is_on_its_way_before_any_of_it_is_shown() -> None:
    joined = NodeInfo("c", "h:1", "", 1, max_instances=4, initial_instances=2)
    seen = replace(CROWDED, nodes={**CROWDED.nodes, "c": joined})
    found = count_instances(seen)
    assert (found.wanted, found.missing) == (4, {"c": 2})
    assert after(Scaler(TERMS), seen, 0.0, 10.0, 99.0) is None
    fewer = replace(seen, desired={"c": 1})
    assert count_instances(fewer).wanted == 3, "what is desired counts first"


def scaled_out_and_forgotten(*loads: InstanceLoad) -> ClusterView:
    """A node that was started for one instance, and has four, which no number in etcd asks for."""
    node = NodeInfo("a", "h:1", "", 1, max_instances=8, initial_instances=1)
    return replace(view([info(f"a-{n}") for n in range(4)], loads), nodes={"a": node})


def test_without_a_number_instances_are_added_to_what_runs() -> None:
    seen = scaled_out_and_forgotten(*(load(f"a-{n}", 25, 800) for n in range(4)))
    found = after(Scaler(TERMS), seen, 0.0, 10.0)
    assert found is not None and (found.action, found.desired) == (Action.ADD, {"a": 5})


def test_without_a_number_one_goes_of_what_runs() -> None:
    seen = scaled_out_and_forgotten()
    found = after(Scaler(TERMS), seen, 0.0, 10.0)
    assert found is not None
    assert (found.action, found.victim, found.desired) == (Action.REMOVE, "a-3", {"a": 3})
    draining = replace(seen, instances={**seen.instances, "a-3": info("a-3", DRAINING)})
    assert count_instances(draining).wanted == 3, "what drains is not to stay"


def test_as_many_are_added_as_bring_the_mean_to_its_range() -> None:
    loads = [load("a-0", 100, 1000, waiting=300, waiting_blocks=2000), load("b-0", 100, 900)]
    seen = view([info("a-0"), info("b-0")], loads)
    have = supply(seen, seen.instances)
    assert (have.available, have.requests, have.blocks) == (-1900, 500, BLOCKS)
    assert have.missing_to(10.0) == 7
    found = after(Scaler(TERMS), seen, 0.0, 10.0)
    assert found is not None and found.desired == {"a": 4, "b": 4}, "and at most eight in all"
    found = after(Scaler(replace(TERMS, maximum=20)), seen, 0.0, 10.0)
    assert found is not None and found.desired == {"a": 4, "b": 4}, "nor more than nodes take"


def test_the_mean_must_be_out_of_range_without_a_break() -> None:
    scaler = Scaler(TERMS)
    busy = view([info("a-0")], [load("a-0", 50, 0)])  # 20 blocks a request: neither
    assert after(scaler, CROWDED, 0.0, 9.0) is None
    assert after(scaler, busy, 9.5) is None
    assert after(scaler, CROWDED, 10.0, 19.9, 20.0) is not None
    scaler = Scaler(TERMS)
    assert after(scaler, CROWDED, 0.0, 9.0) is None
    scaler.forget()
    assert after(scaler, CROWDED, 100.0, 109.0, 110.0) is not None


def test_after_a_change_there_is_a_pause() -> None:
    scaler = Scaler(TERMS)
    assert after(scaler, CROWDED, 0.0, 10.0) is not None
    assert after(scaler, CROWDED, 11.0, 25.0, 39.0, 40.0) is not None


def test_instances_on_their_way_are_waited_for_but_not_for_ever() -> None:
    starting = view(
        [info("a-0"), info("b-0"), info("b-1", STARTING)],
        CROWDED.loads.values(),
        b=2,
    )
    scaler = Scaler(TERMS)
    found = after(scaler, starting, 0.0, 10.0, 50.0, 99.0, 100.0)
    assert found is not None and found.desired == {"a": 2}
    # A wish that the node has not begun to fulfil counts as well.
    assert after(Scaler(TERMS), replace(CROWDED, desired={"b": 2}), 0.0, 10.0, 50.0) is None


def test_the_one_with_the_fewest_running_requests_goes_and_of_these_the_youngest() -> None:
    found = after(Scaler(TERMS), IDLE, 0.0, 9.0, 10.0)
    assert found is not None
    assert (found.action, found.victim, found.desired) == (Action.REMOVE, "b-1", {"b": 1})
    assert found.sentence == (
        "removes b-1: desired are 1 on b, as the mean freeness without it is 656.7 blocks a "
        "request, and has been above 60 for 10 s"
    )
    loads = [load("a-0", 1, 10), load("b-0", 2, 20), load("b-1", 3, 10)]
    found = after(Scaler(TERMS), replace(IDLE, loads={e.instance: e for e in loads}), 0.0, 10.0)
    assert found is not None and (found.victim, found.desired) == ("a-0", {"a": 0})
    many = view([info(f"a-{n}") for n in (2, 9, 10)], limits={"a": 16})
    found = after(Scaler(TERMS), many, 0.0, 10.0)
    assert found is not None and found.victim == "a-10"


def test_none_goes_that_the_others_could_not_do_without() -> None:
    """Above the range with it, but not without it."""
    loads = [load("a-0", 10, 600), load("b-0", 12, 0)]
    seen = view([info("a-0"), info("b-0")], loads)
    assert supply(seen, seen.instances).mean() > TERMS.high
    assert after(Scaler(TERMS), seen, 0.0, 10.0, 100.0) is None


def test_one_goes_at_a_time() -> None:
    draining = view([info("a-0"), info("b-0"), info("b-1", DRAINING)], b=1)
    assert after(Scaler(TERMS), draining, 0.0, 10.0, 100.0) is None


def test_what_is_about_to_go_is_kept_instead_of_an_addition_and_without_a_pause() -> None:
    scaler = Scaler(TERMS)
    assert after(scaler, IDLE, 0.0, 10.0) is not None
    loads = [load("a-0", 50, 1000), load("b-0", 50, 600)]
    rising = view([info("a-0"), info("b-0"), info("b-1", DRAINING)], loads, b=1)
    found = after(scaler, rising, 11.0, 20.0, 21.0)
    assert found is not None
    assert (found.action, found.desired, found.victim) == (Action.KEEP, {"b": 2}, None)
    kept = replace(rising, desired={"b": 2})
    assert after(scaler, kept, 22.0, 60.0, 90.0) is None, "it is shown as draining, but kept"


def test_what_an_instance_that_drains_still_runs_counts_as_the_others() -> None:
    loads = [load("a-0", 10, 100), load("b-0", 40, 700)]
    seen = view([info("a-0"), info("b-0", DRAINING)], loads, b=0)
    have = supply(seen, {"a-0": info("a-0")})
    assert (have.available, have.requests, have.blocks) == (200, 50, BLOCKS)


def test_a_node_that_leaves_or_is_drained_is_let_be() -> None:
    loads = [load("b-0", 100, 1000)]
    leaving = view([info("a-0", DRAINING), info("b-0")], loads, limits={"a": 4, "b": 4}, a=1)
    found = after(Scaler(TERMS), leaving, 0.0, 10.0)
    assert found is not None and (found.action, found.desired) == (Action.ADD, {"b": 2})
    drained = view([info("a-0"), info("b-0")], loads, draining=["a"])
    found = after(Scaler(TERMS), drained, 0.0, 10.0)
    assert found is not None and found.desired == {"b": 2}
    assert after(Scaler(TERMS), replace(drained, loads={}), 0.0, 10.0) is None, "one serves only"


def test_fewer_than_the_minimum_are_made_up_for() -> None:
    seen = view([info("a-0")], limits={"a": 4, "b": 1}, a=1)
    found = after(Scaler(replace(TERMS, minimum=3)), seen, 0.0, 10.0)
    assert found is not None and found.desired == {"b": 1, "a": 2}
    assert found.sentence.endswith("1 in the cluster are fewer than 3")


def test_headroom_of_a_class_counts_as_used() -> None:
    classes = Classes({-1: PriorityClass("high", -1, headroom_tokens=800 * 16)})
    seen = view([info("a-0")], [load("a-0", 50, 100, priorities={-1: 1})])
    assert supply(seen, seen.instances).mean() == 18.0
    assert supply(seen, seen.instances, classes).mean() == 2.0
    assert after(Scaler(TERMS), seen, 0.0, 10.0) is None
    assert after(Scaler(TERMS, classes), seen, 0.0, 10.0) is not None


def test_an_empty_cluster_is_let_be() -> None:
    assert after(Scaler(TERMS), ClusterView(), 0.0, 10.0, 1000.0) is None


@pytest.mark.parametrize(
    ("but", "says"),
    [
        ({"low": 70.0}, "the wanted range of the mean freeness is 70.0 to 60"),
        ({"low": 0.0}, "must begin above 0"),
        ({"minimum": 0}, "there are to be 0 to 8 instances"),
        ({"minimum": 9}, "there are to be 9 to 8 instances"),
        ({"period": -1.0}, "the period of scaling is -1.0 seconds"),
        ({"cooldown": float("nan")}, "the cooldown of scaling is nan seconds"),
        ({"patience": float("inf")}, "the patience of scaling is inf seconds"),
    ],
)
def test_terms_that_cannot_be(but: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TERMS, **but)


class Cluster:
    """A cluster that does what is decided: at once, or within as many looks as `lag` says."""

    def __init__(self, nodes: int, limit: int, first: int, lag: int = 0) -> None:
        self.limits = {f"n{node}": limit for node in range(nodes)}
        self.desired = {node: first for node in self.limits}
        self._lag = lag
        self._changing: list[tuple[int, InstanceInfo]] = []  # for so many more looks

    @property
    def number(self) -> int:
        return sum(self.desired.values())

    def does(self, decision: Decision) -> None:
        for node, number in decision.desired.items():
            slots = range(self.desired[node], number) or range(number, self.desired[node])
            state = DRAINING if decision.action is Action.REMOVE else STARTING
            names = [f"{node}-{slot}" for slot in slots]
            self._changing = [each for each in self._changing if each[1].id not in names]
            if decision.action is not Action.KEEP:  # that is done at once
                self._changing += [(self._lag, info(name, state)) for name in names]
            self.desired[node] = number

    def seen(self, requests: int, blocks: int) -> ClusterView:
        """The view with so many requests of so many blocks, spread evenly over what is up."""
        infos = {
            i: info(i)
            for node, count in self.desired.items()
            for i in (f"{node}-{slot}" for slot in range(count))
        }
        self._changing = [(left - 1, changing) for left, changing in self._changing if left > 0]
        infos |= {changing.id: changing for _, changing in self._changing}
        up = [i for i in infos.values() if i.state is not STARTING]
        shares = [requests // len(up) + (at < requests % len(up)) for at in range(len(up))]
        loads = [load(i.id, share, share * blocks) for i, share in zip(up, shares, strict=True)]
        return replace(view(infos.values(), loads, self.limits), desired=dict(self.desired))


STEP = st.tuples(st.integers(0, 400), st.integers(0, 40), st.integers(1, 40))


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(1, 50),
    st.floats(0, 50),
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(0, 8),
    st.lists(STEP, min_size=1, max_size=6),
)
def test_the_number_stays_within_its_limits_and_rests_under_a_constant_load(
    nodes: int,
    limit: int,
    low: float,
    wider: float,
    minimum: int,
    more: int,
    lag: int,
    steps: list[tuple[int, int, int]],
) -> None:
    terms = ScalingTerms(low, low + wider, 3.0, 5.0, minimum, minimum + more)
    cluster, scaler = Cluster(nodes, limit, 1, lag), Scaler(terms)
    most = min(terms.maximum, nodes * limit)
    now = 0.0
    for requests, blocks, lasting in steps:
        actions = []
        for _ in range(lasting):
            now += 1.0
            before = cluster.number
            found = scaler.decide(cluster.seen(requests, blocks), now)
            if found is None:
                continue
            actions.append(found.action)
            cluster.does(found)
            assert all(0 <= number <= limit for number in cluster.desired.values())
            if found.action is Action.REMOVE:
                assert cluster.number == before - 1 >= terms.minimum
            else:
                assert before < cluster.number <= most
        ways = {action is Action.REMOVE for action in actions}
        assert len(ways) <= 1, "a constant load is answered in one direction"


@given(st.integers(0, 400), st.integers(0, 40), st.integers(1, 8))
def test_a_load_that_lasts_ends_in_the_range_or_at_a_limit(
    requests: int, blocks: int, first: int
) -> None:
    cluster, scaler = Cluster(2, 4, 1), Scaler(TERMS)
    cluster.desired = {"n0": (first + 1) // 2, "n1": first // 2}
    for now in range(0, 2000, 5):
        if found := scaler.decide(cluster.seen(requests, blocks), now):
            cluster.does(found)
    seen = cluster.seen(requests, blocks)
    have = supply(seen, seen.instances)
    assert have.mean() >= TERMS.low or cluster.number == TERMS.maximum
    assert have.mean(-BLOCKS) <= TERMS.high or cluster.number == TERMS.minimum
