"""The pairs of a round: who gives, who takes, and that no request goes to and fro."""

from collections.abc import Iterable
from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import Terms, Thresholds
from llumnix.policy.load import freeness
from llumnix.policy.rebalance import Pair, is_draining, pairs, room
from llumnix.policy.request_choice import DRAIN_RULE, RULES, MovableRequest, Room, choose

READY, DRAINING, STARTING = InstanceState.READY, InstanceState.DRAINING, InstanceState.STARTING
DEFAULT = Terms()


def info(instance: str, **but: object) -> InstanceInfo:
    """An instance of 100 blocks on the node that its name begins with."""
    made = InstanceInfo(instance, instance[0], "m", READY, 100, 16)
    return replace(made, **but)  # type: ignore[arg-type]


def load(instance: str, free: float, running: int = 10) -> InstanceLoad:
    """A load with so much freeness in an instance of 100 blocks."""
    return InstanceLoad(instance, running, used_blocks=round(100 - free * running))


def view(
    infos: Iterable[InstanceInfo], loads: Iterable[InstanceLoad], *draining: str
) -> ClusterView:
    return ClusterView(
        instances={i.id: i for i in infos},
        loads={each.instance: each for each in loads},
        draining=frozenset(draining),
    )


def found(
    *loads: InstanceLoad, thresholds: Thresholds = DEFAULT.thresholds
) -> list[tuple[str, str]]:
    seen = view((info(each.instance) for each in loads), loads)
    return [pair[:2] for pair in pairs(seen, Terms(thresholds))]


def test_the_lowest_is_paired_with_the_highest() -> None:
    loads = [load(i, free) for i, free in zip("abcdef", (1, 6, -2, 9, 2, 7), strict=True)]
    assert found(*loads) == [("c", "d"), ("a", "f"), ("e", "b")]


def test_an_empty_instance_is_the_best_destination() -> None:
    assert found(load("a", 1), load("b", 9), InstanceLoad("c")) == [("a", "c")]


def test_nobody_takes_without_room_and_nobody_gives_who_has_it() -> None:
    assert found(load("a", 1), load("b", 2)) == []
    assert found(load("a", 3), load("b", 9)) == [], "the threshold itself is enough"
    assert found(load("a", 1), load("b", 3)) == []


def test_the_thresholds_are_the_operator_s() -> None:
    loads = load("a", 4), load("b", 9)
    assert found(*loads, thresholds=Thresholds(out_below=5, in_above=5)) == [("a", "b")]
    assert found(*loads, thresholds=Thresholds(out_below=5, in_above=9)) == []


def test_the_difference_must_be_worth_a_move() -> None:
    assert found(load("a", 2.9), load("b", 3.4)) == []
    assert found(load("a", 2.4), load("b", 3.4)) == [("a", "b")]
    assert found(load("a", 2.4), load("b", 3.4), thresholds=Thresholds(min_gain=1.1)) == []


def test_an_only_request_stays() -> None:
    assert found(load("a", 1, running=1), load("b", 9)) == []
    queued = InstanceLoad("a", running=1, waiting=1, used_blocks=99)
    assert found(queued, load("b", 9)) == [("a", "b")]


def test_instances_of_unknown_load_are_left_out() -> None:
    seen = view([info("a"), info("b"), info("c")], [load("a", 1), load("gone", 90)])
    assert pairs(seen, DEFAULT) == []


@pytest.mark.parametrize(
    "but",
    [{"model": "other"}, {"block_size": 32}, {"role": "decode"}, {"state": STARTING}],
)
def test_only_its_like_takes(but: dict[str, object]) -> None:
    loads = [load("a", 1), load("b", 9), load("c", 5)]
    seen = view([info("a"), info("b", **but), info("c")], loads)
    assert pairs(seen, DEFAULT) == [Pair("a", "c")]


def test_equal_roles_are_balanced() -> None:
    seen = view(
        [info("a", role="decode"), info("b"), info("c", role="decode")],
        [load("a", 1), load("b", 9), load("c", 5)],
    )
    assert pairs(seen, DEFAULT) == [Pair("a", "c")]


@pytest.mark.parametrize(("state", "draining"), [(DRAINING, ""), (READY, "a-0"), (READY, "a")])
def test_an_instance_that_drains_comes_first_and_takes_nothing(
    state: InstanceState, draining: str
) -> None:
    infos = [info("a-0", state=state), info("b-0"), info("c-0")]
    loads = [load("a-0", 50, running=1), load("b-0", 1), load("c-0", 9)]
    seen = view(infos, loads, draining)
    assert is_draining(seen, infos[0])
    assert pairs(seen, DEFAULT) == [Pair("a-0", "c-0")], "b-0 waits for the next round"
    assert pairs(view(infos, [InstanceLoad("a-0"), *loads[1:]], draining), DEFAULT) == [
        Pair("b-0", "c-0")
    ], "nothing is left there"


def test_where_there_is_little_room_a_draining_instance_takes_it() -> None:
    infos = [info("a", state=DRAINING), info("b"), info("c"), info("d", state=DRAINING)]
    loads = [load("a", 9), load("b", 0), load("c", 2), load("d", 9)]
    assert pairs(view(infos, loads), DEFAULT) == [Pair("a", "c")], "b is full, so d waits"
    roomy = view([infos[0], infos[2], info("e")], [loads[0], loads[2], load("e", 9)])
    made = pairs(roomy, DEFAULT, lambda p: p != Pair("a", "e"))
    assert made == [Pair("a", "c")], "c takes, so it doesn't give in the same round"


def test_a_draining_role_may_go_where_any_is_welcome() -> None:
    infos = [info("a", role="decode", state=DRAINING), info("b"), info("c", role="prefill")]
    loads = [load("a", 1), load("b", 5), load("c", 9)]
    assert pairs(view(infos, loads), DEFAULT) == [Pair("a", "b")]


def test_what_is_starting_has_nothing_to_give() -> None:
    infos = [info("a", state=STARTING), info("b")]
    assert pairs(view(infos, [load("a", 1), load("b", 9)], "a"), DEFAULT) == []


def test_a_pair_that_is_not_allowed_leaves_its_source_to_the_next_best() -> None:
    loads = [load("a", 1), load("b", 2), load("c", 8), load("d", 9)]
    seen = view(map(info, "abcd"), loads)
    forbidden = Pair("a", "d")
    assert pairs(seen, DEFAULT, lambda p: p != forbidden) == [Pair("a", "c"), Pair("b", "d")]
    assert pairs(seen, DEFAULT, lambda p: p.source != "a") == [Pair("b", "d")]


def test_what_a_destination_has_left() -> None:
    busy = InstanceLoad("b", 4, waiting=2, used_blocks=30, waiting_blocks=9, head_blocks=5)
    seen = view([info("a"), info("b")], [load("a", 1), busy])
    pair = Pair("a", "b")
    assert room(seen, pair, DEFAULT) == Room(65, 5, floor=1.0 + 1.0)
    freer = view([info("a"), info("b")], [load("a", 7), busy])
    assert room(freer, pair, DEFAULT) == Room(65, 5, floor=7.0 + 1.0), (
        "freer than the source is now"
    )
    assert room(view([info("a"), info("b")], [load("a", 1), busy], "a"), pair, DEFAULT) == Room(
        65, 5, floor=-inf
    )
    assert room(seen, Pair("a", "gone"), DEFAULT) is None
    assert room(view([info("a"), info("b")], [busy]), pair, DEFAULT) is None


def test_senseless_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"below a freeness of 5\.0, so they can't take above 3"):
        Thresholds(out_below=5.0)
    with pytest.raises(ValueError, match="gain wanted of a move is nan"):
        Thresholds(min_gain=float("nan"))


class Cluster:
    """Instances and their requests, from which the view is made; moves change it."""

    def __init__(self, infos: list[InstanceInfo], held: dict[str, list[MovableRequest]]) -> None:
        self.infos = infos
        self.held = held

    @property
    def view(self) -> ClusterView:
        return view(self.infos, (self._load(i.id) for i in self.infos))

    def _load(self, instance: str) -> InstanceLoad:
        running = [c.blocks for c in self.held[instance] if c.running]
        waiting = [c.blocks for c in self.held[instance] if not c.running]
        return InstanceLoad(
            instance,
            running=len(running),
            waiting=len(waiting),
            used_blocks=sum(running),
            waiting_blocks=sum(waiting),
            head_blocks=waiting[0] if waiting else 0,
        )

    def freeness(self, instance: str) -> float:
        return freeness(self.view.instances[instance], self.view.loads[instance])

    def move(self, pair: Pair, rule: str, thresholds: Thresholds) -> MovableRequest | None:
        """Do what a pair asks for, as the source would."""
        space = room(self.view, pair, Terms(thresholds))
        assert space is not None
        chosen = choose(self.held[pair.source], rule, space)
        if chosen is not None:
            self.held[pair.source].remove(chosen)
            self.held[pair.destination].append(chosen)
        return chosen


THRESHOLDS = st.builds(
    lambda low, more, gain: Thresholds(low, low + more, gain),
    st.floats(-5, 20),
    st.floats(0, 10),
    st.floats(0, 5),
)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    infos = [
        info(
            name,
            total_blocks=draw(st.sampled_from([50, 100, 200])),
            state=draw(st.sampled_from([READY, READY, READY, DRAINING])),
            model=draw(st.sampled_from(["m", "m", "m", "other"])),
        )
        for name in "abcdef"[: draw(st.integers(2, 6))]
    ]
    sizes = st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=8)
    held = {
        i.id: [
            MovableRequest(f"{i.id}{n}", 0, blocks * 16, blocks, running, n, generated=1)
            for n, (blocks, running) in enumerate(draw(sizes))
        ]
        for i in infos
    }
    return Cluster(infos, held)


@given(clusters(), THRESHOLDS, st.data())
def test_an_instance_is_used_once_and_on_its_side(
    cluster: Cluster, thresholds: Thresholds, data: st.DataObject
) -> None:
    seen = cluster.view
    every = [Pair(a.id, b.id) for a in cluster.infos for b in cluster.infos]
    forbidden = set(data.draw(st.lists(st.sampled_from(every))))
    made = pairs(seen, Terms(thresholds), lambda pair: pair not in forbidden)
    used = [instance for pair in made for instance in pair[:2]]
    assert len(used) == len(set(used))
    assert forbidden.isdisjoint(made)
    for pair in made:
        source, destination = seen.instances[pair.source], seen.instances[pair.destination]
        assert destination.state is READY
        assert source.model == destination.model
        assert cluster.held[pair.source]
        if source.state is READY:
            low = freeness(source, seen.loads[pair.source])
            high = freeness(destination, seen.loads[pair.destination])
            assert low < thresholds.out_below <= thresholds.in_above < high
            assert high - low >= thresholds.min_gain


@given(clusters(), THRESHOLDS, st.sampled_from(list(RULES)))
def test_a_move_is_never_undone_by_the_next(
    cluster: Cluster, thresholds: Thresholds, rule: str
) -> None:
    for pair in pairs(cluster.view, Terms(thresholds)):
        balances = cluster.view.instances[pair.source].state is READY
        lower = cluster.freeness(pair.source)
        if (moved := cluster.move(pair, rule, thresholds)) is None:
            continue
        if balances:
            assert cluster.freeness(pair.destination) > lower, "nobody is now where it was"
        back = Pair(pair.destination, pair.source)
        if back in pairs(cluster.view, Terms(thresholds)):
            assert cluster.move(back, rule, thresholds) != moved


def test_a_move_that_would_only_turn_the_sides_round_is_not_made() -> None:
    large = [
        MovableRequest(f"a{n}", 0, 16 * k, k, True, n, generated=1) for n, k in enumerate((40, 59))
    ]
    small = [MovableRequest(f"b{n}", 0, 96, 6, True, n, generated=1) for n in range(10)]
    cluster = Cluster([info("a"), info("b")], {"a": large, "b": small})
    assert pairs(cluster.view, DEFAULT) == [Pair("a", "b")]
    assert cluster.move(Pair("a", "b"), "SR", DEFAULT.thresholds) is None
    cluster.held["b"].append(cluster.held["a"].pop(0))
    assert pairs(cluster.view, DEFAULT) == [Pair("b", "a")], "as would come of it"


@given(clusters(), THRESHOLDS, st.sampled_from(list(RULES)))
def test_balancing_comes_to_an_end(cluster: Cluster, thresholds: Thresholds, rule: str) -> None:
    """With each move the worse off of two is better off, so that one day nobody moves."""
    cluster.infos = [replace(i, state=READY) for i in cluster.infos]
    for _ in range(200):
        made = pairs(cluster.view, Terms(thresholds))
        if not any([cluster.move(pair, rule, thresholds) for pair in made]):
            return
    raise AssertionError("it goes on and on")


def test_an_instance_drains_in_a_few_rounds() -> None:
    held = [
        MovableRequest(f"r{n}", 0, 80, 5, n % 2 == 0, n, generated=n % 2 == 0) for n in range(8)
    ]
    infos = [info("a", state=DRAINING), info("b"), info("c")]
    cluster = Cluster(infos, {"a": held, "b": [], "c": []})
    rounds = 0
    while made := pairs(cluster.view, DEFAULT):
        rounds += 1
        for pair in made:
            assert cluster.move(pair, DRAIN_RULE, DEFAULT.thresholds)
    assert rounds == 8
    assert cluster.held["a"] == []
    assert min(len(cluster.held["b"]), len(cluster.held["c"])) >= 3
