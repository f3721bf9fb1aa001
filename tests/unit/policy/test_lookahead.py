"""Rescheduling that looks at queues first."""

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import Terms
from llumnix.policy.priority_classes import Classes, PriorityClass
from llumnix.policy.queues import lookahead
from llumnix.policy.rebalance import SPILL, SPILL_FLOOR, Pair, room
from llumnix.policy.request_choice import MovableRequest, Room, choose

READY = InstanceState.READY
FULL = InstanceLoad(
    "a", running=9, waiting=3, used_blocks=95, waiting_blocks=28, head_blocks=20
)  # those behind the head ask for 4 blocks each
ALONE = InstanceLoad("a", running=9, waiting=1, used_blocks=95, waiting_blocks=20, head_blocks=20)


def view(*loads: InstanceLoad) -> ClusterView:
    infos = (InstanceInfo(load.instance, "n", "m", READY, 100, 16) for load in loads)
    return ClusterView(
        instances={info.id: info for info in infos}, loads={load.instance: load for load in loads}
    )


def moves(*loads: InstanceLoad, terms: Terms | None = None) -> list[Pair]:
    return lookahead(view(*loads), terms or Terms(), lambda pair: True)


def test_those_behind_a_blocked_head_go_where_they_fit() -> None:
    near, far = (InstanceLoad(i, 3, used_blocks=n) for i, n in (("b", 90), ("c", 60)))
    assert moves(FULL, near, far) == [Pair("a", "c", SPILL)]
    assert room(view(FULL, near, far), Pair("a", "c", SPILL), Terms()) == Room(40, 3, SPILL_FLOOR)


def test_those_that_run_there_keep_room_to_grow() -> None:
    # One of 4 blocks more leaves 36 blocks to 4 requests, or 32 to 4, which is no more than 8 each.
    for used, spills in ((60, True), (64, False)):
        found = moves(FULL, InstanceLoad("b", 3, used_blocks=used))
        assert (found == [Pair("a", "b", SPILL)]) is spills


def test_where_nobody_is_behind_it_the_head_gets_room_as_in_the_paper() -> None:
    assert moves(ALONE, InstanceLoad("b", 3, used_blocks=60)) == [Pair("a", "b")]


def test_as_it_does_where_those_behind_it_fit_nowhere() -> None:
    assert moves(FULL, InstanceLoad("b", 6, used_blocks=60)) == [Pair("a", "b")]


def test_an_instance_with_a_queue_of_its_own_takes_nothing() -> None:
    queued = InstanceLoad("b", 5, 1, used_blocks=20, waiting_blocks=5, head_blocks=5)
    assert moves(FULL, queued) == [Pair("a", "b")], "but for balance, as in the paper"


def test_each_instance_has_one_move_a_round_and_the_longest_queue_comes_first() -> None:
    shorter = InstanceLoad("b", 9, 2, used_blocks=95, waiting_blocks=24, head_blocks=20)
    free = InstanceLoad("c", 3, used_blocks=60)
    assert moves(shorter, FULL, free) == [Pair("a", "c", SPILL)]


def test_room_that_a_class_keeps_free_is_not_given_away() -> None:
    terms = Terms(classes=Classes({-1: PriorityClass("high", -1, headroom_tokens=60 * 16)}))
    kept = InstanceLoad("b", 3, used_blocks=5, priorities={-1: 1})
    open_ = InstanceLoad("c", 3, used_blocks=60)
    assert moves(FULL, kept, open_, terms=terms) == [Pair("a", "c", SPILL)]


def test_without_a_blocked_queue_it_is_the_paper_s_rule() -> None:
    tight, loose = InstanceLoad("a", 10, used_blocks=90), InstanceLoad("b", 2, used_blocks=10)
    assert moves(tight, loose) == [Pair("a", "b")]


def candidate(
    name: str, blocks: int, order: int, running: bool, head: bool = False
) -> MovableRequest:
    return MovableRequest(name, 0, blocks * 16, blocks, running, order, int(running), head)


WAITING = [
    candidate("head", 20, 3, False, head=True),
    candidate("second", 9, 4, False),
    candidate("third", 4, 5, False),
]
RUNNING = [candidate(f"r{n}", n, 0, True) for n in (2, 6)]


def test_the_first_that_fits_goes_but_never_the_head() -> None:
    chosen = [choose(WAITING + RUNNING, SPILL, Room(n)) for n in (40, 8, 3)]
    assert [c and c.request for c in chosen] == ["second", "third", None]
