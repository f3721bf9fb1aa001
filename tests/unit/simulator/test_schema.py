"""Dataclasses from mappings: what fits, and what is said of what does not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from math import inf
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.simulator.schema import SimConfigError, build


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Inner:
    low: float = 0.0
    high: float = inf

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


@dataclass(frozen=True, slots=True)
class Other:
    size: int


@dataclass(frozen=True)
class Outer:
    count: int
    ratio: float = 1.0
    name: str = ""
    on: bool = False
    mode: Literal["a", "b"] = "a"
    color: Color = Color.RED
    maybe: int | None = None
    inner: Inner = field(default_factory=Inner)
    either: str | int | Inner | Other = 0
    many: tuple[Inner, ...] = ()
    pair: tuple[int, str] = (0, "")
    listed: list[int] = field(default_factory=list)
    some: frozenset[str] = frozenset()
    by_number: Mapping[int, Inner] = field(default_factory=dict)
    anything: Any = None
    derived: int = field(default=0, init=False)


def test_everything_at_once() -> None:
    made = build(
        Outer,
        {
            "count": 3,
            "ratio": 2,
            "name": "n",
            "on": True,
            "mode": "b",
            "color": "blue",
            "maybe": 4,
            "inner": {"low": 1e-3},
            "either": {"size": 7},
            "many": [{}, {"low": 1}],
            "pair": [1, "x"],
            "listed": [1, 2],
            "some": ["p", "q"],
            "by_number": {-1: {"high": 2}},
            "anything": [{"x": None}],
        },
        "top",
    )
    assert made == Outer(
        3,
        2.0,
        "n",
        True,
        "b",
        Color.BLUE,
        4,
        Inner(0.001),
        Other(7),
        (Inner(), Inner(1.0)),
        (1, "x"),
        [1, 2],
        frozenset({"p", "q"}),
        {-1: Inner(high=2.0)},
        [{"x": None}],
    )
    assert isinstance(made.ratio, float) and isinstance(made.color, Color)


@pytest.mark.parametrize(
    "given_, told",
    [
        ({}, "top.count is missing"),
        ([], r"top is \[\], and must have the keys count, ratio"),
        ({"count": 1, "colour": 2}, "top has no key 'colour'; it has count, ratio"),
        ({"count": 1, "derived": 2}, "no key 'derived'"),
        ({"count": 1.5}, "top.count is 1.5, and must be a valid integer"),
        ({"count": True}, "top.count is True, and must be a valid integer"),
        ({"count": None}, "top.count is None, and must be a valid integer"),
        ({"count": 1, "ratio": "x"}, "top.ratio is 'x', and must be a valid number"),
        ({"count": 1, "ratio": False}, "top.ratio is False, and must be a valid number"),
        ({"count": 1, "ratio": "1"}, "top.ratio is '1', and must be a valid number"),
        ({"count": 1, "name": 3}, "top.name is 3, and must be a valid string"),
        ({"count": 1, "on": 1}, "top.on is 1, and must be a valid boolean"),
        ({"count": 1, "mode": "c"}, "top.mode is 'c', and must be 'a' or 'b'"),
        ({"count": 1, "color": "green"}, "top.color is 'green', and must be 'red' or 'blue'"),
        ({"count": 1, "maybe": "x"}, "top.maybe is 'x', and must be a valid integer"),
        ({"count": 1, "inner": {"low": 3, "high": 2}}, "top.inner: low is above high"),
        ({"count": 1, "inner": {"lo": 3}}, "top.inner has no key 'lo'; it has low, high"),
        ({"count": 1, "either": {"size": "x"}}, "top.either.size is 'x', and must be a valid int"),
        ({"count": 1, "either": {"low": 3, "high": 2}}, "top.either: low is above high"),
        (
            {"count": 1, "either": {"low": 3, "hi": 2}},
            "top.either has no key 'hi'; it has low, high$",
        ),
        (
            {"count": 1, "either": 1.5},
            "valid string, or be a valid integer, or have the keys low, high, or",
        ),
        ({"count": 1, "many": {}}, r"top.many is \{\}, and must be a valid array"),
        ({"count": 1, "many": [{}, {"low": "x"}]}, r"top.many\[1\].low is 'x'"),
        ({"count": 1, "pair": [1]}, r"top.pair\[1\] is missing"),
        ({"count": 1, "some": "p"}, "top.some is 'p', and must be a valid array"),
        ({"count": 1, "by_number": {"x": {}}}, "a key of top.by_number is 'x'"),
        ({"count": 1, "by_number": [1]}, r"top.by_number is \[1\], and must be an object"),
        ({"count": 1, "name": list(range(99))}, r"5, \.\.\.\], and must be a valid string"),
    ],
)
def test_what_does_not_fit(given_: Any, told: str) -> None:
    with pytest.raises(SimConfigError, match=told):
        build(Outer, given_, "top")


@given(st.builds(Inner, st.floats(0, 1), st.floats(1, 2)))
def test_back_and_forth(inner: Inner) -> None:
    assert build(Inner, asdict(inner), "top") == inner
