"""The leader's rescheduler: what it commands, when it holds, and what it remembers of failures."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from llumnix.actors.manager import DRAIN_MOVES, ManagerActor, MoveCommand, Outcome, Scaling
from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState, NodeInfo
from llumnix.control.desired import Wish
from llumnix.policy.decision_context import Terms, Thresholds
from llumnix.policy.moves import BACKOFF_LONGEST
from llumnix.policy.queues import queues
from llumnix.policy.rebalance import Pair
from llumnix.policy.rescheduler import PAPER, Pace
from llumnix.policy.scaling import ScalingTerms

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

    def __init__(self, seen: ClusterView = UNEQUAL, **options: Any) -> None:
        self.epoch: int | None = 17
        options.setdefault("pace", PAPER)  # one move at once, so that each can be told apart
        self.current = True
        self.commands: list[MoveCommand] = []
        self.proxy: Any = ManagerActor.start(
            lambda: self.epoch, lambda: self.current, self.commands.append, **options
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

    def ends(self, pair: Pair, failure: str = "", blameless: bool = False) -> None:
        self.proxy.finished(pair, Outcome(failure, blameless)).get(timeout=5.0)

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
    assert led.commands == [MoveCommand(17, A, "node-a", B, "balance")]
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


# ---- how many instances there are ----


CROWDED = replace(
    view(load(A, 4.0), load(B, 5.0)),
    nodes={n: NodeInfo(n, "h:1", "1", 1, 2) for n in ("node-a", "node-b")},
)
IDLE = replace(CROWDED, loads={A: InstanceLoad(A, 2, used_blocks=10)}, desired={"node-b": 1})


class Scaled(Led):
    """A manager that scales, with a clock of its own."""

    def __init__(self, seen: ClusterView) -> None:
        self.now = 0.0
        self.wishes: list[Wish] = []
        terms = ScalingTerms(period=10.0, cooldown=30.0)
        super().__init__(seen, scaling=Scaling(terms, self.wishes.append, lambda: self.now))

    def at(self, now: float) -> list[Wish]:
        """What is wished for at that time."""
        before, self.now = len(self.wishes), now
        self.ticks()
        return self.wishes[before:]


@pytest.fixture
def scaled(caplog: pytest.LogCaptureFixture) -> Scaled:
    caplog.set_level("INFO")
    return Scaled(CROWDED)


def test_an_addition_is_a_wish_and_a_sentence(
    scaled: Scaled, caplog: pytest.LogCaptureFixture
) -> None:
    assert [scaled.at(now) for now in (0.0, 9.0)] == [[], []]
    assert scaled.at(10.0) == [Wish(17, {"node-a": 2}, {})]
    assert caplog.messages == [
        "epoch 17: adds instances: desired are 2 on node-a, as the mean freeness is 4.5 blocks a "
        "request, and has been below 10 for 10 s"
    ]
    scaled.sees(replace(CROWDED, desired={"node-a": 2}))
    assert scaled.at(100.0) == scaled.at(200.0) == [], "they are on their way"


def test_a_removal_names_the_instance_and_what_was_seen(
    scaled: Scaled, caplog: pytest.LogCaptureFixture
) -> None:
    scaled.sees(IDLE)
    scaled.at(0.0)
    assert scaled.at(10.0) == [Wish(17, {"node-b": 0}, {"node-b": 1}, without=B)]
    assert caplog.messages == [
        "epoch 17: removes node-b-0: desired are 0 on node-b, as the mean freeness without it is "
        "495.0 blocks a request, and has been above 60 for 10 s"
    ]


def test_nothing_is_scaled_while_etcd_is_silent_and_the_period_begins_anew(
    scaled: Scaled, caplog: pytest.LogCaptureFixture
) -> None:
    scaled.at(0.0)
    scaled.current = False
    assert scaled.at(10.0) == scaled.at(50.0) == []
    assert caplog.messages == ["epoch 17: moves and scales nothing while etcd is silent"]
    scaled.current = True
    assert scaled.at(60.0) == scaled.at(69.0) == []
    assert len(scaled.at(70.0)) == 1


def test_a_new_leader_begins_with_fresh_timers_and_what_is_desired(scaled: Scaled) -> None:
    scaled.at(0.0)
    assert len(scaled.at(10.0)) == 1
    scaled.sees(replace(IDLE, desired={"node-a": 1, "node-b": 1}))
    scaled.epoch = None
    assert scaled.at(15.0) == []
    scaled.epoch = 23
    assert scaled.at(16.0) == scaled.at(25.0) == []
    assert [wish.epoch for wish in scaled.at(26.0)] == [23], "no pause after another's change"


def test_who_does_not_lead_scales_nothing(scaled: Scaled) -> None:
    scaled.epoch = None
    assert scaled.at(0.0) == scaled.at(100.0) == []


# ---- queues ----

QUEUED = InstanceLoad(
    A, 10, 5, used_blocks=990, waiting_blocks=100, head_blocks=20
)  # a blocked head of 20 blocks, and four others of as many
ROOM = InstanceLoad(B, 5, used_blocks=850)


@pytest.fixture
def clocked() -> Led:
    """A leader of the rule `queues`, whose term has begun."""
    led = Led(view(), planner=queues, pace=Pace(), clock=lambda: led.now)  # type: ignore[attr-defined]
    led.now = 0.0  # type: ignore[attr-defined]
    led.ticks()
    return led


def test_a_view_that_shows_a_blocked_queue_is_acted_upon_at_once(clocked: Any) -> None:
    clocked.now = 0.1
    clocked.sees(view(QUEUED, ROOM))
    (command,) = clocked.commands
    assert command.pair == Pair(A, B, "queue") and (command.count, command.blocks) == (5, 150)
    clocked.ends(command.pair)
    clocked.now = 0.15
    clocked.sees(view(replace(QUEUED, running=9), ROOM))
    assert len(clocked.commands) == 1, "no two rounds within a tenth of a second"


def test_only_a_leader_that_etcd_answers_acts_upon_a_view(clocked: Any) -> None:
    clocked.now, clocked.current = 1.0, False
    clocked.sees(view(QUEUED, ROOM))
    clocked.current, clocked.epoch = True, None
    clocked.sees(view(QUEUED, ROOM))
    assert not clocked.commands


def test_a_request_that_has_ended_is_not_held_against_the_pair() -> None:
    led = Led(pace=Pace(copies=2))
    led.ticks()
    for _ in range(5):
        led.ends(PAIR, "request r has ended", blameless=True)
        assert led.rests() == 1
