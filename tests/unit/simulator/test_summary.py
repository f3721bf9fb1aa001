"""The numbers of a run, and their table."""

from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.simulator.result import Result
from llumnix.simulator.summary import spread, summarize, table
from tests.kit.results import result


def test_all_requests() -> None:
    group = summarize(result()).everything
    assert (group.requests, group.ended) == (4, 3)
    assert group.prefill.mean == pytest.approx(2.0) and group.prefill.worst == 3.0
    assert group.decode.mean == pytest.approx(0.2)  # not of the request with one token
    assert group.latency.p50 == pytest.approx(2.3)
    assert group.preemption_loss == 1.0  # divided by all requests
    assert (group.preemptions, group.preempted) == (1, 0.25)
    assert group.moves == 1 and group.downtime.worst == 0.02


def test_each_priority() -> None:
    groups = summarize(result()).by_priority
    assert list(groups) == [-1, 0]
    assert groups[-1].requests == 1 and groups[0].requests == 3
    assert isnan(groups[-1].decode.mean)


def test_the_cluster() -> None:
    summary = summarize(result())
    assert summary.mean_instances == 2.0
    assert summary.memory_load == pytest.approx(0.6)  # not of the sample without blocks
    assert summary.fragmentation == pytest.approx(0.2)


def test_nothing_happened() -> None:
    empty = summarize(Result([], [], 0.0, 0.0, 0.0))
    assert empty.everything.requests == 0 and isnan(empty.mean_instances)
    assert "none failed" in table(empty)


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_a_spread_is_in_order(values: list[float]) -> None:
    found = spread(values)
    assert min(values) <= found.p50 <= found.p99 <= found.worst == max(values)


def test_the_table() -> None:
    lines = table(summarize(result())).splitlines()
    assert lines[0].split() == ["all", "priority", "-1", "priority", "0"]
    assert [line.split() for line in lines if line.startswith("prefill mean")] == [
        ["prefill", "mean", "(s)", "2.000", "3.000", "1.500"]
    ]
    assert lines[-4:] == [
        "10.0 s of virtual time in 0.5 s (20x)",
        "2.000 instances on average, 20 instance seconds",
        "60.0% of KV blocks used, 20.0% lost to fragmentation",
        "1 moves; 3 failed: 1 ended, 2 no room",
    ]
