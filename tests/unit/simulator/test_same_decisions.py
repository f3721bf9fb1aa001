"""The live cluster and the simulator decide alike, whatever the view that is put before them.

A simulated run is recorded: every view, and what was decided on it. Each view then goes the way of
a live cluster, as JSON in the values of etcd's keys, to the actors of a leader, which command
the same moves, numbers of instances and dispatches.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from llumnix.actors.dispatcher import DispatcherActor
from llumnix.actors.manager import ManagerActor, MoveCommand, Outcome, Scaling
from llumnix.cluster import ClusterView, InstanceId
from llumnix.control import codec
from llumnix.control.desired import Wish
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys
from llumnix.control.view import ViewBuilder
from llumnix.plugins import dispatch_policy, planner
from llumnix.policy.decision_context import Thresholds
from llumnix.policy.dispatch import Request
from llumnix.policy.dispatch_state import DispatchState
from llumnix.policy.priority_classes import PriorityClass
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import TOGETHER
from llumnix.policy.rescheduler import MoveOrder, Rescheduler
from llumnix.policy.scaling import Decision, Scaler, ScalingTerms
from llumnix.simulator.cluster import ClusterConfig, EngineConfig, PolicyConfig
from llumnix.simulator.distributions import ArrivalProcess
from llumnix.simulator.run import Simulation
from llumnix.simulator.workload import Workload, generate

SEED = 5
SCALING = ScalingTerms(low=20.0, high=60.0, period=2.0, cooldown=3.0, maximum=6)
CLASSES = (PriorityClass("high", -1, target_tokens=1600),)


class Viewed(NamedTuple):
    """All see a new view."""

    view: ClusterView


class Dispatched(NamedTuple):
    """A request was dispatched."""

    request: Request
    instance: InstanceId | None


class Rounded(NamedTuple):
    """A round of rescheduling has taken place, on the clock or as a view asked for it."""

    orders: list[MoveOrder]
    now: float
    urgent: ClusterView | None = None


class Finished(NamedTuple):
    """A move has ended."""

    pair: Pair
    outcome: Outcome


@dataclass
class Recorded:
    """All that was decided in a run, and on what, in order."""

    events: list[Any] = field(default_factory=list)
    scalings: list[tuple[ClusterView, float, Decision | None]] = field(default_factory=list)


def record(simulated: ClusterConfig) -> Recorded:
    """Run a simulation, and keep what it decides."""
    book = Recorded()
    with pytest.MonkeyPatch.context() as patch:

        def spy(owner: type, name: str, note: Any) -> None:
            real = getattr(owner, name)

            def call(self: Any, *args: Any) -> Any:
                result = real(self, *args)
                note(result, *args)
                return result

            patch.setattr(owner, name, call)

        events = book.events
        spy(DispatchState, "update_view", lambda _, view: events.append(Viewed(view)))
        spy(DispatchState, "decide", lambda i, request: events.append(Dispatched(request, i)))
        spy(Rescheduler, "orders", lambda made, view, now: events.append(Rounded(made, now)))
        spy(
            Rescheduler,
            "urgent",
            lambda made, view, now: events.append(Rounded(made, now, view)),
        )
        spy(
            Rescheduler,
            "finished",
            lambda _, pair, moved, blameless, *what: events.append(
                Finished(pair, Outcome("" if moved else "no", blameless, *what))
            ),
        )
        spy(Scaler, "decide", lambda made, view, now: book.scalings.append((view, now, made)))
        run(simulated)
    return book


def config(dispatch: str, rescheduling: str) -> ClusterConfig:
    """Small engines, which are full and empty in turn."""
    policy = PolicyConfig(
        dispatch=dispatch,
        rescheduling=rescheduling,
        thresholds=Thresholds(out_below=10, in_above=10),
        classes=CLASSES,
    )
    engine = EngineConfig(total_blocks=200, max_model_len=3200, max_num_batched_tokens=3200)
    return ClusterConfig(instances=4, engine=engine, policy=policy, scaling=SCALING)


def run(simulated: ClusterConfig) -> None:
    workload = Workload(
        requests=300,
        arrivals=ArrivalProcess("gamma", rate=5.0, cv=3.0),
        prompt="medium",
        output="short",
        priorities={-1: 0.1},
        max_tokens=3000,
    )
    jobs, _ = generate(workload, SEED)
    Simulation(simulated, jobs, lambda ended: None, SEED).run()


def counts(order: MoveOrder) -> list[int]:
    """The commands of an order, and how many requests each is for."""
    return [order.moves] if order.pair.rule in TOGETHER else [1] * order.moves


class Wire:
    """The way of a view through etcd."""

    def __init__(self) -> None:
        self._keys = Keys("test")
        self._builder = ViewBuilder(self._keys)
        self._revision = 0

    def view(self, view: ClusterView) -> ClusterView:
        """What a leader's registry makes of the keys that say this."""
        keys, values = self._keys, {}
        for node in view.nodes.values():
            values[keys.node(node.id)] = codec.encode_node(node)
            values[keys.load(node.id)] = codec.encode_loads(list(view.loads.values()))
        for info in view.instances.values():
            values[keys.instance(info.id)] = codec.encode_instance(info)
        for name, number in view.desired.items():
            values[keys.desired(name)] = str(number).encode()
        self._revision += 1
        items = {
            key: KeyValue(key, value, self._revision, self._revision)
            for key, value in values.items()
        }
        return self._builder.build(items, self._revision)


@pytest.mark.parametrize(
    ("dispatch", "rescheduling"),
    [
        ("load", "llumnix"),
        ("interference", "lookahead"),
        ("slo", "lookahead"),
        ("artifact", "artifact"),
        ("rr", "lookahead"),
        ("load", "queues"),
        ("rr", "queues"),
    ],
)
def test_a_recorded_run_is_decided_alike_by_the_actors(dispatch: str, rescheduling: str) -> None:
    simulated = config(dispatch, rescheduling)
    recorded = record(simulated)
    policy, terms = simulated.policy, simulated.policy.terms(simulated.engine.latency)
    commands: list[MoveCommand] = []
    plan = planner(policy.rescheduling)
    assert plan is not None
    now = [0.0]
    leader: Any = ManagerActor.start(
        lambda: 7, lambda: True, commands.append, terms, plan, clock=lambda: now[0]
    ).proxy()
    leader.tick().get(timeout=5.0)  # its term begins
    dispatcher: Any = DispatcherActor.start(
        "d0", dispatch_policy(policy.dispatch), policy.top_k, SEED, terms, 1
    ).proxy()
    wire, wanted, decided = Wire(), 0, 0
    try:
        for event in recorded.events:
            match event:
                case Viewed(view):
                    seen = wire.view(view)
                    dispatcher.update_view(seen).get(timeout=5.0)
                case Dispatched(request, instance):
                    to = dispatcher.decide(request.tokens, request.priority).get(timeout=5.0)
                    assert (to.instance if to else None) == instance
                    decided += 1
                case Rounded(orders, when, urgent):
                    now[0] = when
                    if urgent is None:
                        leader.tick().get(timeout=5.0)
                    else:
                        leader.update_view(wire.view(urgent)).get(timeout=5.0)
                    ordered = [
                        (order.pair, number, order.blocks)
                        for order in orders
                        for number in counts(order)
                    ]
                    made = [(c.pair, c.count, c.blocks) for c in commands[wanted:]]
                    assert made == ordered
                    wanted = len(commands)
                case Finished(pair, outcome):
                    leader.finished(pair, outcome).get(timeout=5.0)
    finally:
        leader.actor_ref.stop()
        dispatcher.actor_ref.stop()
    assert decided == 300 and wanted > 20


def test_the_number_of_instances_is_decided_alike() -> None:
    simulated = config("load", "llumnix")
    recorded = record(simulated)
    terms = simulated.policy.terms(simulated.engine.latency)
    wishes: list[Wish] = []
    now = [0.0]
    leader: Any = ManagerActor.start(
        lambda: 7, lambda: True, lambda command: None, terms,
        scaling=Scaling(SCALING, wishes.append, lambda: now[0]),
    ).proxy()  # fmt: skip
    try:
        wire, changes = Wire(), 0
        for view, when, decision in recorded.scalings:
            now[0] = when
            leader.update_view(wire.view(view)).get(timeout=5.0)
            leader.tick().get(timeout=5.0)
            made = wishes[changes:]
            changes = len(wishes)
            assert [(w.numbers, w.without) for w in made] == (
                [(decision.desired, decision.victim)] if decision else []
            )
    finally:
        leader.actor_ref.stop()
    assert changes > 2
