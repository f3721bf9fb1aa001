"""The leader's rescheduler: what it commands, when it holds, and what it remembers of failures."""

from collections.abc import Iterable
from typing import Any

import pytest

from llumnix.actors.manager import DRAIN_MOVES, MOVED, ManagerActor, MoveCommand
from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.policy.moves import BACKOFF_LONGEST
from llumnix.policy.rebalance import Pair
from llumnix.policy.terms import Terms, Thresholds

A, B, C = "node-a-0", "node-b-0", "node-c-0"
PAIR = Pair(A, B)


def load(instance: str, free: float, running: int = 10) -> InstanceLoad:
    """A load with so much freeness in an instance of 1000 blocks."""
    return InstanceLoad(instance, running, used_blocks=round(1000 - free * running))


def view(*loads: InstanceLoad, draining: Iterable[str] = ()) -> ClusterView:
    infos = (
        InstanceInfo(each.instance, each.instance[:-2], "m", InstanceState.READY, 1000, 16)
        for each in loads
    )
    return ClusterView(
        instances={i.id: i for i in infos},
        loads={each.instance: each for each in loads},
        draining=frozenset(draining),
    )


UNEQUAL = view(load(A, 2.1), load(B, 90.0))


class Led:
    """A rescheduler, the cluster around it, and what it has commanded."""

    def __init__(self, seen: ClusterView = UNEQUAL, **knobs: Any) -> None:
        self.epoch: int | None = 17
        self.current = True
        self.commands: list[MoveCommand] = []
        self.proxy: Any = ManagerActor.start(
            lambda: self.epoch, lambda: self.current, self.commands.append, **knobs
        ).proxy()
        self.sees(seen)

    def sees(self, seen: ClusterView) -> None:
        self.proxy.update_view(seen).get(timeout=5.0)

    def ticks(self, times: int = 1) -> list[Pair]:
        """What is commanded in so many ticks."""
        before = len(self.commands)
        for _ in range(times):
            self.proxy.tick().get(timeout=5.0)
        return [command.pair for command in self.commands[before:]]

    def ends(self, pair: Pair, outcome: str = MOVED) -> None:
        self.proxy.finished(pair, outcome).get(timeout=5.0)

    def rests(self, pair: Pair = PAIR) -> int:
        """How many ticks pass without a command for a pair that has just failed."""
        for passed in range(2 * BACKOFF_LONGEST):
            if pair in self.ticks():
                return passed + 1
        raise AssertionError(f"{pair} is never tried again")


@pytest.fixture
def led(caplog: pytest.LogCaptureFixture) -> Led:
    caplog.set_level("INFO")
    return Led()


def test_a_decision_is_a_command_and_a_sentence(led: Led, caplog: pytest.LogCaptureFixture) -> None:
    led.ticks()
    assert led.commands == [MoveCommand(17, A, "node-a", B, "node-b", "balance")]
    assert caplog.messages == [
        "epoch 17: moves a request from node-a-0 (freeness 2.1) to node-b-0 (freeness 90.0)"
    ]


def test_a_pair_is_not_commanded_again_before_its_move_has_ended(led: Led) -> None:
    assert led.ticks(5) == [PAIR]
    led.ends(PAIR)
    assert led.ticks(5) == [PAIR]
    led.ends(Pair(A, C))
    led.ends(PAIR)
    led.ends(PAIR)
    assert led.ticks() == [PAIR], "an answer that nobody waits for changes nothing"


def test_an_instance_has_one_move_at_once(led: Led) -> None:
    led.ticks()
    led.sees(view(load(A, 1.0), load(B, 80.0), load(C, 90.0)))
    assert led.ticks() == [], "A is already moving a request away"
    led.sees(view(load(A, 2.0), load(B, 90.0), load(C, 1.0)))
    assert led.ticks() == [], "and B is already taking one"
    led.ends(PAIR)
    assert led.ticks() == [Pair(C, B)]


def test_who_does_not_lead_commands_nothing(led: Led, caplog: pytest.LogCaptureFixture) -> None:
    led.epoch = None
    assert led.ticks(3) == []
    assert not caplog.messages
    led.epoch = 18
    led.ticks()
    assert [command.epoch for command in led.commands] == [18]


def test_a_new_term_begins_with_nothing_under_way(led: Led) -> None:
    led.ticks()
    led.ends(PAIR, "node-b cannot be reached")
    led.epoch = None
    led.ticks()
    led.epoch = 17
    assert led.ticks() == [], "the same term goes on"
    led.epoch = 21
    assert led.ticks() == [PAIR]


def test_it_holds_while_etcd_is_silent(led: Led, caplog: pytest.LogCaptureFixture) -> None:
    led.current = False
    assert led.ticks(3) == []
    assert caplog.messages == ["epoch 17: moves nothing while etcd is silent"]
    led.current = True
    assert led.ticks() == [PAIR]


def test_a_pair_that_fails_rests_longer_and_longer(
    led: Led, caplog: pytest.LogCaptureFixture
) -> None:
    led.ticks()
    rests = []
    for _ in range(6):
        led.ends(PAIR, "no memory there")
        rests.append(led.rests())
    assert rests == [2, 4, 8, 16, 32, 32]
    assert (
        "epoch 17: no request moved from node-a-0 to node-b-0: no memory there; "
        "they rest for 8 intervals" in caplog.messages
    )
    led.ends(PAIR)
    assert led.ticks() == [PAIR], "a move that was made ends that"
    led.ends(PAIR, "no memory there")
    assert led.rests() == 2


def test_a_failure_long_past_is_forgotten(led: Led) -> None:
    led.ticks()
    for _ in range(3):
        led.ends(PAIR, "no memory there")
        led.rests()
    led.ends(PAIR, "no memory there")
    led.sees(view())
    led.ticks(16 + BACKOFF_LONGEST + 1)
    led.sees(UNEQUAL)
    assert led.ticks() == [PAIR]
    led.ends(PAIR, "no memory there")
    assert led.rests() == 2


def test_while_a_pair_rests_the_source_goes_elsewhere(led: Led) -> None:
    led.ticks()
    led.ends(PAIR, "no memory there")
    led.sees(view(load(A, 2.0), load(B, 90.0), load(C, 50.0)))
    assert led.ticks() == [Pair(A, C)]


def test_an_answer_that_is_lost_does_not_block_a_pair_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    led = Led(patience=5)
    assert led.ticks(5) == [PAIR]
    assert led.ticks() == []
    assert caplog.messages[-1] == (
        "epoch 17: no request moved from node-a-0 to node-b-0: no answer within 5 intervals; "
        "they rest for 2 intervals"
    )
    assert led.rests() == 2


def test_an_instance_that_is_emptied_moves_several_at_once(
    led: Led, caplog: pytest.LogCaptureFixture
) -> None:
    led.sees(view(load(A, 50.0), load(B, 90.0), draining=["node-a"]))
    assert led.ticks(3) == [PAIR] * DRAIN_MOVES
    assert {command.reason for command in led.commands} == {"drain"}
    assert caplog.messages == [
        "epoch 17: moves 4 requests from node-a-0 (drains) to node-b-0 (freeness 90.0)"
    ]
    led.ends(PAIR)
    assert led.ticks() == [PAIR]


def test_no_more_moves_than_requests_are_left() -> None:
    led = Led(view(load(A, 50.0, running=3), load(B, 90.0), draining=[A]), drain_moves=8)
    assert led.ticks(3) == [PAIR] * 3


def test_several_failures_at_once_are_one_setback() -> None:
    led = Led(view(load(A, 50.0), load(B, 90.0), draining=[A]), drain_moves=3)
    led.ticks()
    for _ in range(3):
        led.ends(PAIR, "no memory there")
    assert led.rests() == 2


def test_a_destination_of_many_moves_takes_none_for_balance() -> None:
    drains = load(A, 50.0, running=2)
    led = Led(view(drains, load(B, 90.0), draining=[A]))
    led.ticks()
    led.sees(view(drains, load(B, 90.0), load(C, 1.0), draining=[A]))
    assert led.ticks() == []


def test_the_thresholds_are_those_given() -> None:
    assert Led(terms=Terms(Thresholds(out_below=2.0))).ticks() == []
