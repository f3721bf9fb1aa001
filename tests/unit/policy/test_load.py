"""Virtual usage and freeness: Algorithm 1 by hand-made examples."""

from math import inf

import pytest

from llumnix.cluster import InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.load import (
    InFlight,
    dispatch_freeness,
    dispatch_usage,
    freeness,
    virtual_usage,
)

INFO = InstanceInfo("i", "n", "m", InstanceState.READY, total_blocks=100, block_size=16)
DRAINING = InstanceInfo("i", "n", "m", InstanceState.DRAINING, total_blocks=100, block_size=16)
BUSY = InstanceLoad("i", running=4, waiting=2, used_blocks=60, waiting_blocks=30, head_blocks=10)


def test_dispatch_counts_the_whole_queue_and_what_is_in_flight() -> None:
    sent = InFlight(requests=2, blocks=20, tokens=320)
    assert dispatch_usage(BUSY) == 90
    assert dispatch_usage(BUSY, sent) == 110
    assert dispatch_freeness(INFO, BUSY) == (100 - 90) / 6
    assert dispatch_freeness(INFO, BUSY, sent) == (100 - 110) / 8  # overloaded: negative


def test_rescheduling_counts_the_head_of_the_queue_only() -> None:
    assert virtual_usage(INFO, BUSY) == 70
    assert freeness(INFO, BUSY) == (100 - 70) / 5


@pytest.mark.parametrize("sent", [InFlight(), InFlight(1, 10, 160)])
def test_an_empty_instance_is_infinitely_free_until_something_is_sent(sent: InFlight) -> None:
    idle = InstanceLoad("i")
    assert freeness(INFO, idle) == inf
    assert dispatch_freeness(INFO, idle, sent) == (90 if sent.requests else inf)


def test_an_instance_that_drains_is_the_least_free_of_all() -> None:
    assert freeness(DRAINING, BUSY) == -inf
    assert freeness(DRAINING, InstanceLoad("i")) == -inf


def test_in_flight_adds_and_takes_away() -> None:
    assert InFlight().plus(3, 40).plus(1, 9).minus(3, 40) == InFlight(1, 1, 9)
