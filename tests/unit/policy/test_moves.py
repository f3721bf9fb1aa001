"""What a leader has under way: how much more may begin, what is given up, and who rests."""

import pytest

from llumnix.policy.moves import BACKOFF_LONGEST, MovesUnderWay
from llumnix.policy.rebalance import Pair

PATIENCE = 10
AB, BA, AC, CB = Pair("a", "b"), Pair("b", "a"), Pair("a", "c"), Pair("c", "b")


def ticks(moves: MovesUnderWay, count: int) -> list[Pair]:
    """What is given up in so many ticks."""
    return [pair for _ in range(count) for pair in moves.next_tick()]


def fail(moves: MovesUnderWay, pair: Pair = AB) -> int:
    """A move that is made and fails; for how many ticks the pair rests then."""
    moves.begin(pair)
    assert moves.end(pair, moved=False)
    return moves.rest(pair)


@pytest.fixture
def moves() -> MovesUnderWay:
    return MovesUnderWay(PATIENCE)


def test_nothing_is_under_way_at_first(moves: MovesUnderWay) -> None:
    assert moves.of("a") == 0 and moves.rest(AB) == 0 and moves.vacant(AB, 4) == 4
    assert not moves.end(AB, moved=True) and not ticks(moves, 100)


def test_a_move_counts_at_both_of_its_instances(moves: MovesUnderWay) -> None:
    moves.begin(AB)
    moves.begin(AC)
    assert (moves.of("a"), moves.of("b"), moves.of("c")) == (2, 1, 1)
    assert moves.vacant(AB, 4) == moves.vacant(BA, 4) == moves.vacant(AC, 4) == 2
    assert moves.vacant(CB, 4) == 3 and moves.vacant(Pair("d", "e"), 4) == 4
    assert moves.end(AB, moved=True)
    assert (moves.of("a"), moves.of("b"), moves.of("c")) == (1, 0, 1)
    assert not moves.end(AB, moved=True), "it has ended already"
    assert moves.of("a") == 1


def test_more_may_be_under_way_than_the_limit_of_another_reason(moves: MovesUnderWay) -> None:
    for _ in range(3):
        moves.begin(AB)
    assert moves.vacant(AB, 1) == -2


def test_what_gets_no_answer_is_given_up(moves: MovesUnderWay) -> None:
    moves.begin(AB)
    assert not ticks(moves, 4)
    moves.begin(AB)
    assert not ticks(moves, PATIENCE - 5)
    assert ticks(moves, 1) == [AB]
    assert moves.of("a") == 1 and moves.rest(AB) == 2
    assert not ticks(moves, 3)
    assert ticks(moves, 1) == [AB]
    assert moves.of("a") == moves.of("b") == 0


def test_all_that_are_late_are_given_up_at_once(moves: MovesUnderWay) -> None:
    for pair in (AB, AB, CB):
        moves.begin(pair)
    assert sorted(ticks(moves, PATIENCE)) == [AB, AB, CB]
    assert not ticks(moves, 5 * PATIENCE)
    assert not moves.end(AB, moved=True), "an answer that comes too late"


def test_a_pair_rests_twice_as_long_after_each_failure(moves: MovesUnderWay) -> None:
    for rest in (2, 4, 8, 16, 32, 32, BACKOFF_LONGEST):
        assert fail(moves) == rest
        assert moves.vacant(AB, 4) == 0, "nothing begins"
        assert moves.vacant(AC, 4) == moves.vacant(BA, 4) == 4, "others are not concerned"
        for left in range(rest, 0, -1):
            assert moves.rest(AB) == left
            moves.next_tick()
        assert moves.rest(AB) == 0 and moves.vacant(AB, 4) == 4


def test_moves_that_fail_together_are_one_setback(moves: MovesUnderWay) -> None:
    for _ in range(3):
        moves.begin(AB)
    for _ in range(3):
        moves.end(AB, moved=False)
    assert moves.rest(AB) == 2


def test_a_success_ends_the_rest_and_forgets_the_failures(moves: MovesUnderWay) -> None:
    for _ in range(3):
        ticks(moves, fail(moves))
    moves.begin(AB)
    moves.begin(AB)
    moves.end(AB, moved=False)
    assert moves.rest(AB) == 16
    moves.end(AB, moved=True)
    assert moves.rest(AB) == 0
    assert fail(moves) == 2


def test_failures_of_long_ago_are_forgotten(moves: MovesUnderWay) -> None:
    assert fail(moves) == 2
    ticks(moves, 2 + BACKOFF_LONGEST)
    assert fail(moves) == 4, "just in time"
    ticks(moves, 4 + BACKOFF_LONGEST + 1)
    assert fail(moves) == 2


def test_a_blameless_failure_is_tried_again_at_the_next_tick(moves: MovesUnderWay) -> None:
    for _ in range(5):
        moves.begin(AB)
        assert moves.end(AB, moved=False, blameless=True)
        assert moves.rest(AB) == 1 and moves.vacant(AB, 4) == 0
        moves.next_tick()
        assert moves.rest(AB) == 0
    assert fail(moves) == 2, "and the first real failure is the first"


def test_those_that_wait_keep_nobody_busy(moves: MovesUnderWay) -> None:
    waiting = Pair("a", "b", "queue")
    moves.begin(waiting)
    assert moves.busy(waiting) and moves.vacant(AB, 1) == 1 and moves.of("a") == 0
    assert moves.end(waiting, moved=True) and not moves.busy(waiting)


def test_those_that_wait_are_tried_twice_in_a_tick(moves: MovesUnderWay) -> None:
    waiting = Pair("a", "b", "queue")
    for rest in (0, 1):
        moves.begin(waiting)
        assert moves.end(waiting, moved=False, blameless=True) and moves.rest(waiting) == rest
    moves.next_tick()
    assert moves.rest(waiting) == 0
