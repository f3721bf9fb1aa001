"""Which request leaves: every rule by hand-made examples, and what a destination takes."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.policy.request_choice import DRAIN_RULE, RULES, MovableRequest, Room, choose

PLENTY = Room(10_000)


def candidate(request: str, order: int, tokens: int = 100, **but: int | bool) -> MovableRequest:
    made = MovableRequest(request, 0, tokens, -(-tokens // 16), True, order, generated=1)
    return replace(made, **but)  # type: ignore[arg-type]


MIXED = [
    candidate("important", 0, 50, priority=-1),
    candidate("long", 1, 900),
    candidate("middle", 2, 300),
    candidate("prefilling", 3, 10, generated=0),
    candidate("unimportant", 4, 400, priority=5),
    candidate("unimportant and short", 5, 200, priority=5),
    candidate("last", 6, 500),
    candidate("queued first", 7, 20, running=False, generated=0),
    candidate("queued last", 8, 10, running=False, generated=0),
]


def named(candidates: Sequence[MovableRequest], rule: str, room: Room = PLENTY) -> str | None:
    chosen = choose(candidates, rule, room)
    return chosen.request if chosen else None


@pytest.mark.parametrize(
    ("rule", "leaves"),
    [
        ("low", "unimportant and short"),
        ("LCR", "last"),
        ("SR", "important"),
        ("LR", "long"),
        ("FCR", "important"),
        ("FCW", "queued first"),
        ("FCWSR", "queued first"),
    ],
)
def test_each_rule(rule: str, leaves: str) -> None:
    assert named(MIXED, rule) == leaves
    assert named(MIXED[::-1], rule) == leaves, "the order of the list says nothing"


def test_the_shortest_running_goes_when_none_is_queued() -> None:
    assert named(MIXED[:7], "FCWSR") == "important"
    assert named(MIXED[:7], "FCW") is None


def test_of_equals_the_last_come_goes() -> None:
    twins = [candidate("a", 0), candidate("b", 1)]
    assert {named(twins, rule) for rule in ("low", "SR", "LR")} == {"b"}


def test_one_in_its_prefill_stays() -> None:
    assert not [r for r in RULES if r != "FCW" and named([MIXED[3]], r)]


def test_what_does_not_fit_leaves_the_next_to_the_rule() -> None:
    assert [named(MIXED, "LR", Room(n)) for n in (57, 56, 31, 3, 0)] == [
        "long",
        "last",
        "unimportant",
        None,
        None,
    ]


def test_the_destination_must_be_left_with_enough() -> None:
    asks = candidate("r", 0, 160)  # ten blocks
    assert Room(40, 1, floor=14.9).takes(asks)  # (40 - 10) / 2
    assert not Room(40, 1, floor=15.0).takes(asks)
    assert not Room(39, 1, floor=14.9).takes(asks)
    assert not Room(40, 2, floor=14.9).takes(asks)
    assert Room(10, 50).takes(asks), "without a floor it need only fit"
    assert not Room(9, 0).takes(asks)
    assert not Room(-5, 3, floor=-100.0).takes(asks), "an overloaded destination takes nothing"


def test_emptying_leaves_nothing_behind() -> None:
    left = [c for c in MIXED if c.generated or not c.running]
    went = []
    while chosen := choose(left, DRAIN_RULE, PLENTY):
        left.remove(chosen)
        went.append(chosen.request)
    assert not left
    assert went[:3] == ["queued first", "queued last", "important"]


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule 'best' to choose a request; there are low, LCR"):
        choose([], "best", PLENTY)


CANDIDATES = st.lists(
    st.builds(
        MovableRequest,
        request=st.uuids().map(str),
        priority=st.integers(-2, 2),
        tokens=st.integers(1, 999),
        blocks=st.integers(1, 60),
        running=st.booleans(),
        order=st.integers(0, 99),
        generated=st.integers(0, 3),
    ),
    max_size=8,
    unique_by=lambda c: c.order,
)
ROOMS = st.builds(Room, st.integers(-20, 80), st.integers(0, 5), st.floats(-20, 20))


@given(CANDIDATES, st.sampled_from(list(RULES)), ROOMS)
def test_whoever_leaves_is_taken_and_is_the_rule_s_choice(
    candidates: list[MovableRequest], rule: str, room: Room
) -> None:
    chosen = choose(candidates, rule, room)
    fitting = [c for c in candidates if room.takes(c)]
    if chosen is None:
        may = [c for c in fitting if (c.generated > 0 if c.running else "W" in rule)]
        assert not may or rule in ("FCW", "behind", "queue", "tail")
        return
    assert chosen in fitting
    assert chosen.generated > 0 or not chosen.running
    rivals = [c for c in fitting if c.running and c.generated > 0 and c is not chosen]
    if rule == "low":
        assert all((c.priority, -c.tokens) <= (chosen.priority, -chosen.tokens) for c in rivals), (
            "nobody less important, and nobody as important and shorter, stays"
        )


def test_who_keeps_headroom_goes_only_if_no_other_can() -> None:
    room = Room(10_000, headroom={-1: 0})
    assert named(MIXED, "SR", room) == "unimportant and short", "the shortest is important"
    assert named(MIXED, "FCR", room) == "long"
    assert named(MIXED[:1] + MIXED[3:4], "SR", room) == "important", "the other is prefilling"
    upside_down = Room(10_000, headroom={5: 0})
    assert named(MIXED, "low", upside_down) == "middle", "of a low priority, but kept"


def test_headroom_is_taken_along() -> None:
    important = candidate("important", 0, 160, priority=-1)  # 10 blocks
    just = Room(100, 9, 3.0, headroom={-1: 59})  # 3.1 are left each
    assert named([important], "low", just) == "important"
    assert named([important], "low", just._replace(headroom={-1: 60})) is None
    assert named([important], "low", Room(70, headroom={-1: 61})) is None
    normal = candidate("normal", 0, 160)
    assert named([normal], "low", just._replace(headroom={-1: 99})) == "normal"
