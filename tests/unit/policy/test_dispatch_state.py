"""The state of a dispatcher: who is a candidate, what is in flight, and who gets the request."""

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.plugins import POLICIES
from llumnix.policy.dispatch import Request
from llumnix.policy.dispatch_state import HOPELESS, DispatchState, is_awaited
from llumnix.policy.load import InFlight


def info(
    instance: str, node: str = "n0", total: int = 100, state: InstanceState = InstanceState.READY
) -> InstanceInfo:
    return InstanceInfo(instance, node, "m", state, total, 16)


def view(
    *infos: InstanceInfo,
    loads: tuple[InstanceLoad, ...] = (),
    draining: frozenset[str] = frozenset(),
) -> ClusterView:
    return ClusterView(
        instances={i.id: i for i in infos},
        loads={load.instance: load for load in loads},
        draining=draining,
    )


def board(*infos: InstanceInfo, policy: str = "load", top_k: int = 1) -> DispatchState:
    made = DispatchState("me", POLICIES[policy], top_k, Random(3))
    made.update_view(view(*infos))
    return made


def spread(of: DispatchState, requests: int) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for _ in range(requests):
        chosen = of.decide(Request(blocks=10))
        assert chosen is not None
        of.sent(chosen, blocks=10, tokens=160)
        counts[chosen] = counts.get(chosen, 0) + 1
    return counts


@pytest.mark.parametrize("policy", ["load", "queue", "memory", "freeness"])
def test_many_dispatchers_do_not_run_to_the_same_instance(policy: str) -> None:
    """Each has two requests between two reports, by which one instance is the best of all."""
    names = [f"i{n}" for n in range(256)]
    loads = [InstanceLoad(i, running=9, waiting=3, used_blocks=90) for i in names[1:]]
    seen = replace(
        view(*map(info, names), loads=(InstanceLoad("i0"), *loads)),
        nodes={f"n{n}": NodeInfo(f"n{n}", "n:1", "", 1, api_servers=4) for n in range(16)},
    )
    counts = dict.fromkeys(names, 0)
    for n in range(64):
        made = DispatchState(f"n{n}", POLICIES[policy], 1, Random(n))
        made.update_view(seen)
        for instance, count in spread(made, 2).items():
            counts[instance] += count
    assert sum(counts.values()) == 128
    assert 0 < counts["i0"] <= 12, "the best gets more than its share, and not all"
    assert max(count for i, count in counts.items() if i != "i0") <= 5


def test_few_dispatchers_look_at_all_instances() -> None:
    names = [f"i{n}" for n in range(64)]
    loads = [InstanceLoad(i, running=9, waiting=3, used_blocks=90) for i in names[1:]]
    nodes = {f"n{n}": NodeInfo(f"n{n}", "n:1", "", 1) for n in range(3)}
    made = DispatchState("n0", POLICIES["load"], 1, Random(1))
    seen = view(*map(info, names), loads=(InstanceLoad("i0"), *loads))
    made.update_view(replace(seen, nodes=nodes))
    assert made.decide(Request(blocks=10)) == "i0"


def test_nobody_to_send_to() -> None:
    assert DispatchState("me").decide(Request(blocks=1)) is None
    assert board(info("a")).decide(Request(blocks=1), exclude={"a"}) is None


@pytest.mark.parametrize(
    "shut",
    [
        view(info("a"), info("b", state=InstanceState.STARTING)),
        view(info("a"), info("b", state=InstanceState.DRAINING)),
        view(info("a"), info("b", total=0)),
        view(info("a"), info("b"), draining=frozenset({"b"})),
        view(info("a", node="n0"), info("b", node="n1"), draining=frozenset({"n1"})),
        view(info("a")),
    ],
)
def test_only_open_instances_are_candidates_and_they_come_back(shut: ClusterView) -> None:
    both = view(info("a"), info("b"))
    made = board()
    for now, expected in ((both, {"a", "b"}), (shut, {"a"}), (both, {"a", "b"})):
        made.update_view(now)
        assert set(made.scores) == expected


def test_a_burst_between_two_reports_is_spread() -> None:
    assert spread(board(info("a"), info("b"), info("c")), 30) == {"a": 10, "b": 10, "c": 10}


@pytest.mark.parametrize("policy", ["queue", "balanced", "rr"])
def test_the_simple_policies_spread_evenly_too(policy: str) -> None:
    assert spread(board(info("a"), info("b"), policy=policy), 10) == {"a": 5, "b": 5}


def test_a_report_covers_what_it_counts_and_nothing_later() -> None:
    made = board(info("a"))
    first = made.sent("a", 10, 160)
    made.sent("a", 5, 80)
    assert made.in_flight("a") == InFlight(2, 15, 240)

    other = InstanceLoad("a", received={"somebody else": 99})
    made.update_view(view(info("a"), loads=(other,)))
    assert made.in_flight("a") == InFlight(2, 15, 240)

    covering = InstanceLoad("a", running=1, used_blocks=10, received={"me": first})
    made.update_view(view(info("a"), loads=(covering,)))
    assert made.in_flight("a") == InFlight(1, 5, 80)
    assert made.scores["a"] == (100 - 15) / 2  # counted once each, wherever it is


def test_sequence_numbers_grow_over_all_instances_from_the_first() -> None:
    made = DispatchState("me", first_sequence=500)
    made.update_view(view(info("a"), info("b")))
    assert [made.sent(i, 1, 1) for i in ("a", "b", "gone", "a")] == [500, 501, 502, 503]


def test_what_never_arrived_is_taken_back() -> None:
    made = board(info("a"))
    lost, arrived = made.sent("a", 10, 160), made.sent("a", 5, 80)
    made.cancel("a", lost)
    made.cancel("a", lost)
    made.cancel("unknown", arrived)
    assert made.in_flight("a") == InFlight(1, 5, 80)


def test_an_engine_that_starts_anew_has_nothing_in_flight() -> None:
    made = board(info("a"))
    made.sent("a", 10, 160)
    made.update_view(view(info("a", total=0, state=InstanceState.STARTING)))
    made.update_view(view(info("a")))
    assert made.in_flight("a") == InFlight()
    again = made.sent("a", 5, 80)
    made.update_view(view(info("a"), loads=(InstanceLoad("a", received={"me": again}),)))
    assert made.in_flight("a") == InFlight()


def test_draining_keeps_what_is_in_flight_because_it_may_be_cancelled() -> None:
    made = board(info("a"))
    made.sent("a", 10, 160)
    made.update_view(view(info("a"), draining=frozenset({"a"})))
    made.update_view(view(info("a")))
    assert made.in_flight("a") == InFlight(1, 10, 160)


def test_a_forgotten_instance_is_gone_until_a_view_brings_it() -> None:
    made = board(info("a"), info("b"))
    made.sent("a", 10, 160)
    made.forget("a")
    assert set(made.scores) == {"b"}
    assert made.in_flight("a") == InFlight()


def test_a_request_too_large_for_an_instance_goes_to_a_larger_one() -> None:
    large_and_busy = InstanceLoad("large", running=9, used_blocks=190)
    made = board()
    made.update_view(
        view(info("small", total=50), info("large", total=200), loads=(large_and_busy,))
    )
    assert made.decide(Request(blocks=50)) == "small"
    assert made.decide(Request(blocks=51)) == "large"
    assert made.decide(Request(blocks=999)) == "small"  # nobody can hold it: the engine will say so
    assert made.decide(Request(blocks=51), exclude={"large"}) == "small"


def test_a_newcomer_is_not_flooded_by_the_balanced_policy() -> None:
    made = board(info("a"), info("b"), policy="balanced")
    spread(made, 100)
    made.update_view(view(info("a"), info("b"), info("c")))
    assert spread(made, 30) == {"a": 10, "b": 10, "c": 10}


def test_top_k_leaves_the_worst_alone() -> None:
    loads = tuple(InstanceLoad(i, running=1, used_blocks=n) for n, i in enumerate("abc"))
    made = board(top_k=2)
    made.update_view(view(*(info(i) for i in "abc"), loads=loads))
    assert {made.decide(Request(blocks=1)) for _ in range(100)} == {"a", "b"}


def test_a_senseless_top_k_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k is 0"):
        DispatchState("me", top_k=0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=30), st.data())
def test_scores_kept_are_the_scores_computed_anew(
    dispatches: list[tuple[str, int]], data: st.DataObject
) -> None:
    """After any dispatches and reports, the board knows what a fresh one would compute."""
    infos = [info(i) for i in "abc"]
    made = board(*infos)
    sent: dict[str, list[tuple[int, int]]] = {i: [] for i in "abc"}
    loads: dict[str, InstanceLoad] = {}
    for instance, blocks in dispatches:
        sent[instance].append((made.sent(instance, blocks, 0), blocks))
        if data.draw(st.booleans()):
            covered = data.draw(st.integers(0, 40))
            sent[instance] = [item for item in sent[instance] if item[0] > covered]
            loads[instance] = InstanceLoad(instance, running=covered, received={"me": covered})
            made.update_view(view(*infos, loads=tuple(loads.values())))
    for instance in "abc":
        blocks_left = sum(blocks for _, blocks in sent[instance])
        assert made.in_flight(instance) == InFlight(len(sent[instance]), blocks_left, 0)
    fresh = DispatchState("me")
    fresh.update_view(view(*infos, loads=tuple(loads.values())))
    for instance in "abc":
        for _, blocks in sent[instance]:
            fresh.sent(instance, blocks, 0)
    assert made.scores == fresh.scores


@pytest.mark.parametrize(
    ("state", "failed", "draining", "awaited"),
    [
        (InstanceState.STARTING, 0, "", True),
        (InstanceState.STARTING, HOPELESS - 1, "", True),
        (InstanceState.STARTING, HOPELESS, "", False),
        (InstanceState.STARTING, 0, "a", False),
        (InstanceState.STARTING, 0, "n0", False),
        (InstanceState.READY, 0, "", False),
        (InstanceState.DRAINING, 0, "", False),
    ],
)
def test_which_instances_are_waited_for(
    state: InstanceState, failed: int, draining: str, awaited: bool
) -> None:
    seen = view(replace(info("a", state=state), failed_starts=failed))
    assert is_awaited(replace(seen, draining=frozenset({draining})), seen.instances["a"]) is awaited
