"""Rescheduling that looks at queues first."""

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.classes import Classes, PriorityClass
from llumnix.policy.lookahead import MAKE_ROOM, lookahead
from llumnix.policy.rebalance import SPILL, Pair, room
from llumnix.policy.select import Candidate, Room, choose
from llumnix.policy.terms import Terms

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
    near, far = (InstanceLoad(i, 5, used_blocks=n) for i, n in (("b", 90), ("c", 60)))
    assert moves(FULL, near, far) == [Pair("a", "c", SPILL)]
    assert room(view(FULL, near, far), Pair("a", "c", SPILL), Terms()) == Room(40)


def test_where_nobody_is_behind_it_the_head_gets_room() -> None:
    other = InstanceLoad("b", 5, used_blocks=60)
    assert moves(ALONE, other) == [Pair("a", "b", MAKE_ROOM)]
    found = room(view(ALONE, other), Pair("a", "b", MAKE_ROOM), Terms())
    assert found is not None and found.wanted == 20 - 5


def test_as_it_does_where_those_behind_it_fit_nowhere() -> None:
    assert moves(FULL, InstanceLoad("b", 5, used_blocks=97)) == [Pair("a", "b", MAKE_ROOM)]


def test_an_instance_with_a_queue_of_its_own_takes_nothing() -> None:
    queued = InstanceLoad("b", 5, 1, used_blocks=20, waiting_blocks=5, head_blocks=5)
    assert moves(FULL, queued) == [Pair("a", "b")], "but for balance, as in the paper"


def test_each_instance_has_one_move_a_round_and_the_longest_queue_comes_first() -> None:
    shorter = InstanceLoad("b", 9, 2, used_blocks=95, waiting_blocks=24, head_blocks=20)
    free = InstanceLoad("c", 5, used_blocks=60)
    assert moves(shorter, FULL, free) == [Pair("a", "c", SPILL)]


def test_room_that_a_class_keeps_free_is_not_given_away() -> None:
    terms = Terms(classes=Classes({-1: PriorityClass("high", -1, headroom_tokens=60 * 16)}))
    kept = InstanceLoad("b", 5, used_blocks=30, priorities={-1: 1})
    open_ = InstanceLoad("c", 5, used_blocks=80)
    assert moves(FULL, kept, open_, terms=terms) == [Pair("a", "c", SPILL)]


def test_without_a_blocked_queue_it_is_the_paper_s_rule() -> None:
    tight, loose = InstanceLoad("a", 10, used_blocks=90), InstanceLoad("b", 2, used_blocks=10)
    assert moves(tight, loose) == [Pair("a", "b")]


def candidate(name: str, blocks: int, order: int, running: bool, head: bool = False) -> Candidate:
    return Candidate(name, 0, blocks * 16, blocks, running, order, int(running), head)


WAITING = [
    candidate("head", 20, 3, False, head=True),
    candidate("second", 9, 4, False),
    candidate("third", 4, 5, False),
]
RUNNING = [candidate(f"r{n}", n, 0, True) for n in (2, 6, 17, 30)]


def test_the_first_that_fits_goes_but_never_the_head() -> None:
    chosen = [choose(WAITING + RUNNING, SPILL, Room(n)) for n in (40, 8, 3)]
    assert [c and c.request for c in chosen] == ["second", "third", None]


def test_who_makes_room_is_just_large_enough() -> None:
    chosen = [choose(RUNNING, MAKE_ROOM, Room(40, wanted=n)) for n in (1, 5, 15, 35)]
    assert [c and c.request for c in chosen] == ["r2", "r6", "r17", "r30"]
    fits = choose(RUNNING, MAKE_ROOM, Room(20, wanted=25))
    assert fits is not None and fits.request == "r17", "the largest, where none is enough"


def test_the_unimportant_make_room_first() -> None:
    important = [
        Candidate("high", -1, 160, 10, True, 0, 1),
        Candidate("low", 0, 800, 50, True, 1, 1),
    ]
    chosen = choose(important, MAKE_ROOM, Room(60, wanted=5))
    assert chosen is not None and chosen.request == "low"
