"""Queues first: who begins elsewhere, how many at once, and what is promised only once."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.decision_context import TERMS
from llumnix.policy.moves import Planned
from llumnix.policy.queues import queues
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import MovableRequest, Room, choose_together
from llumnix.policy.rescheduler import PAPER, Pace, Rescheduler

READY = InstanceState.READY
# A head of 20 blocks that does not fit, and four behind it of 10 each.
FULL = InstanceLoad("a", 9, 5, used_blocks=95, waiting_blocks=60, head_blocks=20)
BLOCKED = Pair("a", "b", "queue")


def view(*loads: InstanceLoad) -> ClusterView:
    infos = (InstanceInfo(load.instance, "n", "m", READY, 100, 16) for load in loads)
    return ClusterView(
        instances={info.id: info for info in infos}, loads={load.instance: load for load in loads}
    )


def moves(*loads: InstanceLoad) -> list[Pair]:
    return queues(view(*loads), TERMS, lambda pair: True)


def test_what_waits_goes_where_it_can_begin() -> None:
    assert moves(FULL, InstanceLoad("b", 2, used_blocks=60)) == [BLOCKED]
    alone = replace(FULL, waiting=1, waiting_blocks=20)
    assert moves(alone, InstanceLoad("b", 2, used_blocks=60)) == [BLOCKED], "the head, too"


def test_a_head_that_fits_where_it_is_stays() -> None:
    fits = replace(FULL, used_blocks=70, running=3)
    assert BLOCKED not in moves(fits, InstanceLoad("b", 2, used_blocks=60))


def test_where_nothing_fits_or_others_wait_nothing_begins() -> None:
    full = InstanceLoad("b", 9, used_blocks=95)
    queued = InstanceLoad("c", 2, 1, used_blocks=60, waiting_blocks=5, head_blocks=5)
    assert BLOCKED not in moves(FULL, full)
    assert Pair("a", "c", "queue") not in moves(FULL, queued)


def test_a_batch_that_is_full_blocks_as_memory_does() -> None:
    """Small requests reach vLLM's max_num_seqs long before the memory is full."""
    small = InstanceLoad("a", 16, 6, used_blocks=20, waiting_blocks=6, head_blocks=1)
    other = InstanceLoad("b", 13, used_blocks=15)

    def orders(*loads: InstanceLoad, most: int) -> list[tuple[Pair, int]]:
        seen = view(*loads)
        limited = {i: replace(info, max_running=most) for i, info in seen.instances.items()}
        made = Rescheduler(queues).orders(replace(seen, instances=limited))
        return [(order.pair, order.moves) for order in made]

    assert orders(small, other, most=16) == [(BLOCKED, 3)], "no more than there are places"
    assert orders(small, replace(other, running=16, used_blocks=20), most=16) == []
    assert orders(small, other, most=0) == orders(small, other, most=64) == []


def test_of_two_that_are_over_full_the_longer_queue_is_cut_in_half_and_not_back() -> None:
    long = InstanceLoad("a", 9, 20, used_blocks=98, waiting_blocks=200, head_blocks=10)
    short = InstanceLoad("b", 9, 2, used_blocks=98, waiting_blocks=20, head_blocks=10)
    rescheduler = Rescheduler(queues)
    (order,) = rescheduler.orders(view(long, short))
    assert order.pair == Pair("a", "b", "tail") and order.blocks == 90
    even = [
        InstanceLoad(i, 9, 11, used_blocks=98, waiting_blocks=110, head_blocks=10) for i in "ab"
    ]
    assert Rescheduler(queues).orders(view(*even)) == []


@given(st.integers(0, 400), st.integers(0, 400))
def test_a_queue_that_was_cut_is_not_sent_back(one: int, other: int) -> None:
    def queued(name: str, blocks: int) -> InstanceLoad:
        return InstanceLoad(
            name, 9, -(-blocks // 10), used_blocks=98, waiting_blocks=blocks,
            head_blocks=min(blocks, 10),
        )  # fmt: skip

    made = Rescheduler(queues).orders(view(queued("a", one), queued("b", other)))
    for order in made:
        less = int(order.blocks) // 10 * 10
        sign = 1 if order.pair.source == "a" else -1
        one, other = one - sign * less, other + sign * less
    if made:
        assert Rescheduler(queues).orders(view(queued("a", one), queued("b", other))) == []


def test_one_round_serves_a_queue_from_all_that_have_room() -> None:
    loads = [InstanceLoad(i, 1, used_blocks=80) for i in "bcd"]
    made = Rescheduler(queues).urgent(view(FULL, *loads), 0.0)
    assert sorted(order.pair.destination for order in made) == ["b", "c", "d"]
    assert {order.blocks for order in made} == {20}


def test_a_room_is_promised_once_until_a_report_covers_what_came() -> None:
    taker = InstanceLoad("b", 2, used_blocks=60)
    other = replace(FULL, instance="c", waiting=4)
    rescheduler = Rescheduler(queues)
    now = iter(range(99))

    def begins(load: InstanceLoad) -> list[float]:
        made = rescheduler.urgent(view(FULL, other, load), float(next(now)))
        return [order.blocks for order in made if order.pair.rule == "queue"]

    assert begins(taker) == [40]
    assert begins(taker) == [], "it is promised"
    rescheduler.finished(BLOCKED, True, requests=3, blocks=37)
    assert begins(taker) == [], "it was taken, and no report says so yet"
    assert begins(replace(taker, running=5, used_blocks=97)) == []
    assert begins(replace(taker, used_blocks=61)) == [39], "two reports later all is in them"


def test_what_failed_promises_nothing() -> None:
    books, seen = Planned(), view(FULL, InstanceLoad("b", 2, used_blocks=60))
    books.begin(BLOCKED, 2, 20)
    there = books.on(seen).loads["b"]
    assert (there.running, there.used_blocks) == (4, 80)
    assert books.on(seen).loads["a"].waiting == 3
    books.end(BLOCKED, 0, 0)
    assert books.on(seen) is seen


def test_the_paper_s_pace_knows_neither_books_nor_haste() -> None:
    seen = view(FULL, InstanceLoad("b", 2, used_blocks=60))
    assert Rescheduler(queues, pace=PAPER).urgent(seen, 9.0) == []
    assert Rescheduler(queues, pace=Pace(soonest=0.0)).urgent(seen, 9.0) == []


def test_those_that_leave_together_fit_together_in_their_order() -> None:
    def one(name: str, blocks: int, order: int, priority: int = 0) -> MovableRequest:
        return MovableRequest(name, priority, blocks * 16, blocks, False, order, 0, queued=True)

    waiting = [one("a", 20, 0), one("b", 5, 1), one("c", 9, 2), one("d", 3, 3, -1)]
    running = [MovableRequest("r", 0, 16, 1, True, 9, 1)]

    def names(rule: str, room: Room, count: int = 9) -> str:
        chosen = choose_together(waiting + running, rule, room, count)
        return "".join(c.request for c in chosen)

    assert names("queue", Room(17)) == "dbc" and names("queue", Room(28)) == "dab"
    assert names("tail", Room(17)) == "cbd" and names("queue", Room(99), 2) == "da"
    assert names("queue", Room(20, 2, floor=4.0)) == "d", "all keep room to grow"
    back = MovableRequest("p", 0, 32, 2, True, 1, 4, queued=True)  # preempted, and in no batch
    assert [c.request for c in choose_together([*waiting, back], "queue", Room(5), 9)] == ["d", "p"]
    assert back not in choose_together([back], "tail", Room(5), 9)
    kept = Room(20, headroom={-1: 15})
    assert names("queue", kept) == "d", "headroom is taken along, once"
