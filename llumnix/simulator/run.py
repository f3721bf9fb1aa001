"""One simulated run: a workload, a cluster of modelled engines, and the production policies."""

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from random import Random
from types import MappingProxyType

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceLoad, InstanceState
from llumnix.plugins import dispatch_policy, planner
from llumnix.policy.board import DispatchBoard
from llumnix.policy.dispatch import Request
from llumnix.policy.rescheduler import Rescheduler
from llumnix.simulator.clock import Clock
from llumnix.simulator.cluster import ClusterConfig
from llumnix.simulator.cost import COSTS
from llumnix.simulator.instance import SimInstance
from llumnix.simulator.job import Job
from llumnix.simulator.moves import SimMoves
from llumnix.simulator.result import Result, Sample, Story
from llumnix.simulator.samples import sample


def simulate(
    config: ClusterConfig,
    jobs: Sequence[Job],
    progress: Callable[[int], None] = lambda ended: None,
    seed: int = 0,
) -> Result:
    """Run a workload through a cluster; `progress` is told each time how many more have ended.

    Deterministic: the same arguments give the same result, but for `wall_seconds`.
    """
    began = time.perf_counter()
    result = Simulation(config, jobs, progress, seed).run()
    result.wall_seconds = time.perf_counter() - began
    return result


class Simulation:
    """The state of one run."""

    def __init__(
        self,
        config: ClusterConfig,
        jobs: Sequence[Job],
        progress: Callable[[int], None],
        seed: int,
    ) -> None:
        self._config = config
        self._jobs = jobs
        self._progress = progress
        self._clock = clock = Clock()
        self._model = config.engine.model()
        policy = config.policy
        self._terms = terms = policy.terms(config.engine.profile)
        dispatch, plan = dispatch_policy(policy.dispatch), planner(policy.rescheduling)
        self._boards = [
            DispatchBoard(f"d{i}", dispatch, policy.top_k, Random(seed + i), 1, terms)
            for i in range(policy.dispatchers)
        ]
        self._turns = cycle(enumerate(self._boards))
        self._rescheduler = Rescheduler(plan, terms) if plan else None
        self._moves = SimMoves(clock, COSTS[config.migration], terms, policy.request, self._moved)
        self._instances: dict[InstanceId, SimInstance] = {}
        self._infos: dict[InstanceId, InstanceInfo] = {}
        self._loads: dict[InstanceId, InstanceLoad] = {}
        self._view = ClusterView()
        self._homeless: list[Story] = []  # that no instance could take
        self._open = len(jobs)
        self._stories: list[Story] = []
        self._samples: list[Sample] = []
        self._spent = 0.0  # instance seconds of those that have ended

    def run(self) -> Result:
        """From the first arrival to the last token."""
        for _ in range(self._config.instances):
            self._start(0.0)
        self._report()
        self._sample()
        if self._rescheduler is not None:
            self._clock.after(self._config.policy.interval, self._reschedule)
        self._arrive_at(0)
        self._clock.run(lambda: not self._open, self._config.longest)
        now = self._clock.now
        spent = self._spent + sum(now - i.began for i in self._instances.values())
        return Result(self._stories, self._samples, now, 0.0, spent, dict(self._moves.failed))

    # ---- requests ----

    def _arrive_at(self, index: int) -> None:
        if index < len(self._jobs):
            self._clock.at(self._jobs[index].at, self._arrive, index)

    def _arrive(self, index: int) -> None:
        story = Story(self._jobs[index])
        self._stories.append(story)
        self._dispatch(story)
        self._arrive_at(index + 1)

    def _dispatch(self, story: Story) -> None:
        job = story.job
        tokens = job.prompt + len(story.times)
        blocks = -(-(tokens + 1) // self._model.block_size)
        number, board = next(self._turns)
        chosen = board.decide(Request(tokens, blocks, job.priority))
        if chosen is None:
            self._homeless.append(story)
            return
        sequence = board.sent(chosen, blocks, tokens)
        instance = self._instances[chosen]
        instance.received[f"d{number}"] = sequence
        story.instance = story.instance or chosen
        instance.add(story)

    def _ended(self, story: Story) -> None:
        self._open -= 1
        self._progress(1)

    # ---- what repeats ----

    def _report(self) -> None:
        """The instances report, and everybody sees it."""
        for instance in self._instances.values():
            if instance.changed:
                instance.changed = False
                self._loads[instance.id] = instance.load()
        self._view = ClusterView(
            instances=MappingProxyType(dict(self._infos)),
            loads=MappingProxyType(dict(self._loads)),
        )
        for board in self._boards:
            board.update_view(self._view)
        self._clock.after(self._config.policy.report_interval, self._report)

    def _reschedule(self) -> None:
        assert self._rescheduler is not None
        self._rescheduler.next_round()
        for order in self._rescheduler.orders(self._view):
            for _ in range(order.moves):
                self._moves.begin(self._view, self._instances, order.pair, order.drains)
        self._clock.after(self._config.policy.interval, self._reschedule)

    def _moved(self, pair: object, moved: bool) -> None:
        assert self._rescheduler is not None
        self._rescheduler.finished(pair, moved)  # type: ignore[arg-type]

    def _sample(self) -> None:
        self._samples.append(
            sample(self._clock.now, self._instances.values(), self._moves.under_way)
        )
        self._clock.after(self._config.sample_interval, self._sample)

    # ---- instances ----

    def _start(self, seconds: float) -> None:
        name = f"i{len(self._infos):04d}"
        instance = SimInstance(name, self._model, self._clock)
        instance.on_end = self._ended
        self._instances[name] = instance
        if seconds:
            self._infos[name] = instance.info
            self._clock.after(seconds, self._ready, instance)
        else:
            self._ready(instance)

    def _ready(self, instance: SimInstance) -> None:
        instance.state = InstanceState.READY
        self._infos[instance.id] = instance.info
