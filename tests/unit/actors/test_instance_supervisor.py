"""The supervisor keeps as many instances running as are wanted, and says what it does."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import pykka
import pytest

from llumnix.actors import instance as instance_module
from llumnix.actors.actor_supervision import DEATHS, Supervised
from llumnix.actors.instance import InstanceActor, Life, Report
from llumnix.actors.instance_supervisor import NodeActor, Roster, Surroundings
from llumnix.cluster import ClusterView, InstanceInfo, InstanceState
from llumnix.dataplane.hosted_instance import HostedInstance
from tests.kit.engines import FACTS, FailingEngine, IdleEngine
from tests.kit.wait import eventually
from tests.unit.actors.conftest import LoopThread
from tests.unit.actors.test_instance import Nobody

LIMIT = 4


class Supervisor:
    """A supervisor, and what it has made and announced."""

    def __init__(self, side: LoopThread, make: Callable[[str], Any] = IdleEngine) -> None:
        self.announced: dict[str, InstanceInfo] = {}
        self.history: list[tuple[str, InstanceState | None]] = []
        self.hosted: dict[str, HostedInstance] = {}
        self.slots: dict[str, int] = {}
        self.requests: dict[str, int] = {}
        self.given_up: list[str] = []
        self._make = make
        around = Surroundings(
            loop=side.loop,
            make=self._host,
            requests=lambda instance: self.requests.get(instance, 0),
            announce=self._announce,
            withdraw=self._withdraw,
            tell=self._tell,
            give_up=self.given_up.append,
        )
        self.roster = Roster()
        self.proxy = Supervised(
            lambda: NodeActor.start("a", "model", LIMIT, 5.0, around, self.roster),
            lambda actor: actor.tell(NodeActor.take_over),
        )

    def _tell(self, slot: int, report: Report) -> None:
        with contextlib.suppress(pykka.ActorDeadError):
            self.proxy.tell(NodeActor.changed, slot, report)

    def _host(self, instance: str, slot: int) -> HostedInstance:
        self.slots[instance] = slot
        self.hosted[instance] = HostedInstance(self._make(instance), Nobody, on_load=lambda: None)
        return self.hosted[instance]

    def _announce(self, info: InstanceInfo) -> None:
        self.announced[info.id] = info
        self.history.append((info.id, info.state))

    def _withdraw(self, instance: str) -> None:
        self.announced.pop(instance, None)
        self.history.append((instance, None))

    def ready(self) -> set[str]:
        return {i.id for i in self.announced.values() if i.state is InstanceState.READY}

    def wants(self, number: int, *ready: str) -> None:
        self.proxy.tell(NodeActor.want, number)
        eventually(lambda: set(self.announced) == self.ready() == set(ready))


@pytest.fixture(autouse=True)
def _short_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_module, "BACKOFF_FIRST", 0.05)
    monkeypatch.setattr(instance_module, "DRAIN_POLL", 0.01)


@pytest.fixture
def node(side: LoopThread) -> Iterator[Supervisor]:
    node = Supervisor(side)
    yield node
    node.proxy.tell(NodeActor.halt)
    eventually(lambda: not node.announced)


def seen(desired: dict[str, int]) -> ClusterView:
    return ClusterView(desired=MappingProxyType(desired))


def test_instances_come_and_go_as_wanted(node: Supervisor) -> None:
    node.wants(3, "a-0", "a-1", "a-2")
    assert node.slots == {"a-0": 0, "a-1": 1, "a-2": 2}
    info = node.announced["a-1"]
    assert (info.node, info.model) == ("a", "model")
    assert (info.total_blocks, info.block_size) == (FACTS.total_blocks, FACTS.block_size)
    node.wants(1, "a-0")
    assert node.hosted["a-1"].engine.stops == node.hosted["a-2"].engine.stops == 1
    node.wants(2, "a-0", "a-1")
    node.wants(0)


def test_each_is_announced_in_all_its_states(node: Supervisor) -> None:
    node.wants(1, "a-0")
    node.wants(0)
    assert [state for _, state in node.history] == [
        InstanceState.STARTING,
        InstanceState.READY,
        InstanceState.DRAINING,
        None,
    ]


def test_the_emptiest_goes_first(node: Supervisor) -> None:
    node.wants(3, "a-0", "a-1", "a-2")
    node.requests = {"a-0": 1, "a-1": 5, "a-2": 3}
    node.wants(2, "a-1", "a-2")
    node.wants(1, "a-1")


def test_an_instance_that_ends_holds_its_slot(
    node: Supervisor, side: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.wants(LIMIT, "a-0", "a-1", "a-2", "a-3")
    hosted = node.hosted["a-3"]
    begun, ended = threading.Event(), asyncio.Event()

    async def stop(timeout: float) -> None:
        begun.set()
        await ended.wait()

    monkeypatch.setattr(hosted.engine, "stop", stop)
    node.proxy.tell(NodeActor.want, 3)
    assert begun.wait(5.0)
    node.proxy.tell(NodeActor.want, LIMIT)
    node.proxy.ask(NodeActor.ping).get(timeout=5.0)
    assert len(node.announced) == LIMIT
    assert node.ready() == {"a-0", "a-1", "a-2"}, "it is too late to keep it"
    side.loop.call_soon_threadsafe(ended.set)
    eventually(lambda: node.ready() == {"a-0", "a-1", "a-2", "a-3"})
    assert node.hosted["a-3"] is not hosted, "it was made anew"


def test_there_are_never_more_than_the_limit(
    node: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    node.wants(99, "a-0", "a-1", "a-2", "a-3")
    assert "99 instances are wanted, but --max-instances is 4" in caplog.messages


def test_desired_is_acted_on_when_it_changes(
    node: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.wants(1, "a-0")
    node.proxy.tell(NodeActor.update_view, seen({"b": 3}))
    node.proxy.tell(NodeActor.update_view, seen({"a": 3}))
    eventually(lambda: node.ready() == {"a-0", "a-1", "a-2"})
    assert "3 instances are desired on this node, by its key in etcd" in caplog.messages
    # The number here was changed since: an old value in a new view says nothing new.
    node.wants(2, "a-0", "a-1")
    node.proxy.tell(NodeActor.update_view, seen({"a": 3, "b": 1}))
    node.proxy.ask(NodeActor.ping).get(timeout=5.0)
    assert len(node.proxy.ask(NodeActor.reports).get(timeout=5.0)) == 2
    node.proxy.tell(NodeActor.update_view, seen({}))
    node.proxy.tell(NodeActor.update_view, seen({"a": 3}))
    eventually(lambda: len(node.ready()) == 3)


def test_without_a_number_there_are_at_least_those_that_the_node_was_started_for(
    node: Supervisor,
) -> None:
    node.roster.initial = 2
    node.wants(1, "a-0")
    node.proxy.tell(NodeActor.update_view, seen({"a": 3}))
    node.proxy.tell(NodeActor.update_view, seen({}))
    eventually(lambda: node.ready() == {"a-0", "a-1", "a-2"})
    node.proxy.tell(NodeActor.update_view, seen({"a": 0}))
    eventually(lambda: not node.announced)
    node.proxy.tell(NodeActor.update_view, seen({}))
    eventually(lambda: node.ready() == {"a-0", "a-1"})


def test_one_that_does_not_start_leaves_the_others_alone(side: LoopThread) -> None:
    def make(instance: str) -> Any:
        return FailingEngine(instance) if instance == "a-1" else IdleEngine(instance)

    node = Supervisor(side, make)
    node.proxy.tell(NodeActor.want, 3)
    eventually(lambda: node.ready() == {"a-0", "a-2"})
    assert node.announced["a-1"].state is InstanceState.STARTING
    eventually(lambda: node.announced["a-1"].failed_starts > 2)  # no request waits for it
    assert node.announced["a-0"].failed_starts == 0
    reports = node.proxy.ask(NodeActor.reports).get(timeout=5.0)
    assert [r.instance for r in reports] == ["a-0", "a-1", "a-2"]
    node.wants(0)


def test_an_instance_whose_actor_has_died_counts_as_stopped(node: Supervisor) -> None:
    node.wants(2, "a-0", "a-1")
    _, second = pykka.ActorRegistry.get_by_class(InstanceActor)
    proxy: Any = second.proxy()
    proxy.came_up.defer("no number of arguments")
    eventually(lambda: not second.is_alive())
    eventually(lambda: node.hosted["a-1"].engine.stops == 1)
    node.wants(1, "a-0")
    node.wants(2, "a-0", "a-1")


def test_a_report_on_its_way_does_not_undo_a_drain(node: Supervisor) -> None:
    node.wants(2, "a-0", "a-1")
    hosted = node.hosted["a-1"]
    hosted._by_name["r"] = object()  # type: ignore[assignment]
    node.proxy.tell(NodeActor.want, 1)
    node.proxy.tell(NodeActor.changed, 1, Report("a-1", Life.READY, FACTS))
    lives = {r.instance: r.life for r in node.proxy.ask(NodeActor.reports).get(timeout=5.0)}
    assert lives["a-1"] is Life.DRAINING
    hosted._by_name.clear()
    eventually(lambda: set(node.announced) == {"a-0"})


def test_leaving_keeps_instances_but_offers_none(node: Supervisor) -> None:
    node.wants(2, "a-0", "a-1")
    node.proxy.tell(NodeActor.drain_all)
    eventually(lambda: not node.ready())
    assert {i.state for i in node.announced.values()} == {InstanceState.DRAINING}
    assert all(hosted.engine.stops == 0 for hosted in node.hosted.values())
    node.proxy.tell(NodeActor.update_view, seen({"a": 4}))
    node.proxy.ask(NodeActor.ping).get(timeout=5.0)
    assert len(node.announced) == 2, "a node that leaves starts nothing any more"
    assert node.proxy.ask(NodeActor.halt).get(timeout=5.0) == 2
    eventually(lambda: node.proxy.ask(NodeActor.left).get(timeout=5.0) == 0)


def test_an_instance_that_comes_up_late_is_not_offered_by_a_node_that_leaves(
    side: LoopThread,
) -> None:
    up = asyncio.Event()
    node = Supervisor(side, lambda instance: IdleEngine(instance, up))
    node.proxy.tell(NodeActor.want, 1)
    eventually(lambda: node.announced)
    node.proxy.tell(NodeActor.drain_all)
    node.proxy.ask(NodeActor.ping).get(timeout=5.0)
    assert node.announced["a-0"].state is InstanceState.DRAINING, "nor is it waited for"
    side.loop.call_soon_threadsafe(up.set)
    eventually(lambda: node.announced["a-0"].total_blocks)
    states = [state for _, state in node.history]
    assert states == [InstanceState.STARTING, *[InstanceState.DRAINING] * 2]
    node.proxy.tell(NodeActor.halt)
    eventually(lambda: not node.announced)


def test_stopping_the_supervisor_stops_its_actors(node: Supervisor) -> None:
    node.wants(2, "a-0", "a-1")
    node.proxy.ask(NodeActor.halt).get(timeout=5.0)
    eventually(lambda: node.proxy.ask(NodeActor.left).get(timeout=5.0) == 0)
    eventually(lambda: len(pykka.ActorRegistry.get_all()) == 1)
    assert Life.STOPPED not in {r.life for r in node.proxy.ask(NodeActor.reports).get(timeout=5.0)}


# ---- instances that are named, and such as are kept after all ----


def test_the_one_that_is_named_goes_first(node: Supervisor) -> None:
    node.wants(3, "a-0", "a-1", "a-2")
    node.requests = {"a-0": 1, "a-1": 5, "a-2": 3}
    node.proxy.tell(
        NodeActor.update_view,
        ClusterView(desired=MappingProxyType({"a": 2}), without=MappingProxyType({"a": "a-1"})),
    )
    eventually(lambda: set(node.announced) == {"a-0", "a-2"})
    node.wants(1, "a-2")


def test_one_that_drains_is_kept_before_another_is_started(
    node: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.wants(2, "a-0", "a-1")
    hosted = node.hosted["a-1"]
    hosted._by_name["r"] = object()  # type: ignore[assignment]
    node.proxy.tell(NodeActor.want, 1)
    eventually(lambda: node.ready() == {"a-0"})
    node.proxy.tell(NodeActor.want, 3)
    eventually(lambda: node.ready() == {"a-0", "a-1", "a-2"})
    assert "instance a-1 is kept: 3 are wanted" in caplog.messages
    assert node.hosted["a-1"] is hosted and hosted.engine.stops == 0
    for number in (1, 3, 1, 3, 1):  # whatever happens in between, the last word counts
        node.proxy.tell(NodeActor.want, number)
    eventually(lambda: {i.state for i in node.announced.values()} >= {InstanceState.DRAINING})
    hosted._by_name.clear()
    eventually(lambda: set(node.announced) == node.ready() == {"a-0"})


def test_one_that_has_ended_before_it_could_be_kept_is_started_anew(node: Supervisor) -> None:
    node.wants(2, "a-0", "a-1")
    for number in (1, 2, 0, 2):
        node.proxy.tell(NodeActor.want, number)
    eventually(lambda: node.ready() == {"a-0", "a-1"})
    node.proxy.ask(NodeActor.ping).get(timeout=5.0)
    assert len(node.proxy.ask(NodeActor.reports).get(timeout=5.0)) == 2


# ---- actors that die ----


def _die(supervisor: Supervised[NodeActor]) -> None:
    """A message that the actor cannot handle, as a bug would send it."""
    supervisor.tell(NodeActor.changed)  # type: ignore[call-arg]  # without its arguments
    eventually(lambda: not supervisor.alive)


def test_a_supervisor_that_died_is_succeeded_and_no_instance_notices(node: Supervisor) -> None:
    node.wants(2, "a-0", "a-1")
    engines = {name: hosted.engine for name, hosted in node.hosted.items()}
    _die(node.proxy)
    node.requests["a-1"] = 1
    node.proxy.start_again()
    node.wants(1, "a-1")
    assert engines["a-0"].stops == 1 and node.hosted["a-1"].engine is engines["a-1"]
    node.wants(2, "a-0", "a-1")


def test_what_is_told_while_there_is_no_supervisor_is_asked_for_again(node: Supervisor) -> None:
    node.wants(1, "a-0")
    actor = node.roster.slots[0].actor
    _die(node.proxy)
    node.announced.clear()
    actor.tell(InstanceActor.report)  # nobody hears it
    actor.ask(InstanceActor.ping).get(timeout=5)
    node.proxy.start_again()
    eventually(lambda: node.ready() == {"a-0"})


def test_an_instances_actor_that_died_gets_a_successor_and_its_engine_is_stopped(
    node: Supervisor,
) -> None:
    node.wants(2, "a-0", "a-1")
    engine = node.hosted["a-0"].engine
    actor = node.roster.slots[0].actor
    actor.tell(InstanceActor.went_down)  # type: ignore[call-arg]
    eventually(lambda: not actor.alive)
    node.proxy.tell(NodeActor.look_after)
    eventually(lambda: node.hosted["a-0"].engine is not engine and node.ready() == {"a-0", "a-1"})
    eventually(lambda: engine.stops == 1)


def _has_another(node: Supervisor, actor: Any) -> bool:
    """Whether the first slot has a successor of that actor; it has none for a moment."""
    slot = node.roster.slots.get(0)
    return slot is not None and slot.actor is not actor


def test_instances_actors_that_die_again_and_again_end_the_node(node: Supervisor) -> None:
    node.wants(1, "a-0")
    for _ in range(DEATHS):
        actor = node.roster.slots[0].actor
        actor.tell(InstanceActor.went_down)  # type: ignore[call-arg]
        eventually(lambda actor=actor: not actor.alive)
        node.proxy.tell(NodeActor.look_after)
        eventually(lambda actor=actor: node.given_up or _has_another(node, actor))
    assert node.given_up == ["the actor of a-0 dies again and again"]
