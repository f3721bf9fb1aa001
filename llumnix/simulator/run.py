"""One simulated run: a workload, a cluster of modelled engines, and the production policies."""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from random import Random

from llumnix.cluster import kv_blocks
from llumnix.plugins import dispatch_policy, planner
from llumnix.policy.dispatch import Request
from llumnix.policy.dispatch_state import DispatchState
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import TOGETHER
from llumnix.policy.rescheduler import MoveOrder, Rescheduler
from llumnix.simulator.cluster import COSTS, ClusterConfig
from llumnix.simulator.fleet import Fleet
from llumnix.simulator.instance import SimInstance, VirtualClock
from llumnix.simulator.moves import SimMoves
from llumnix.simulator.result import Result, Sample, Story
from llumnix.simulator.workload import SimJob


def simulate(
    config: ClusterConfig,
    jobs: Sequence[SimJob],
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
        jobs: Sequence[SimJob],
        progress: Callable[[int], None],
        seed: int,
    ) -> None:
        self._config = config
        self._jobs = jobs
        self._progress = progress
        self._clock = clock = VirtualClock()
        self._model = config.engine.model()
        policy = config.policy
        self._terms = terms = policy.terms(config.engine.latency)
        dispatch, plan = dispatch_policy(policy.dispatch), planner(policy.rescheduling)
        self._dispatchers = [
            DispatchState(f"d{i}", dispatch, policy.top_k, Random(seed + i), 1, terms)
            for i in range(policy.dispatchers)
        ]
        self._turns = cycle(enumerate(self._dispatchers))
        self._rescheduler = Rescheduler(plan, terms, pace=policy.pace) if plan else None
        self._moves = SimMoves(clock, COSTS[config.migration], terms, policy.request, self._moved)
        self._fleet = Fleet(config, terms, clock, self._ended)
        self._homeless: list[Story] = []  # that no instance could take
        self._open = len(jobs)
        self._stories: list[Story] = []
        self._samples: list[Sample] = []

    def run(self) -> Result:
        """From the first arrival to the last token."""
        self._report()
        self._sample()
        if self._rescheduler is not None:
            self._clock.after(self._config.policy.interval, self._reschedule)
        if self._config.scaling is not None:
            self._clock.after(self._config.scaling_interval, self._scale)
        self._arrive_at(0)
        self._clock.run(lambda: not self._open, self._config.longest)
        now = self._clock.now
        failed = dict(self._moves.failed)
        return Result(self._stories, self._samples, now, 0.0, self._fleet.spent, failed)

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
        blocks = kv_blocks(tokens, self._model.block_size)
        number, dispatcher = next(self._turns)
        chosen = dispatcher.decide(Request(tokens, blocks, job.priority))
        if chosen is None:
            self._homeless.append(story)
            return
        sequence = dispatcher.sent(chosen, blocks, tokens, job.priority)
        instance = self._fleet.instances[chosen]
        instance.received[f"d{number}"] = sequence
        story.instance = story.instance or chosen
        instance.add(story)

    def _ended(self, story: Story) -> None:
        self._open -= 1
        self._progress(1)

    # ---- what repeats ----

    def _report(self) -> None:
        """The instances report, and everybody sees it."""
        view = self._fleet.report()
        for dispatcher in self._dispatchers:
            dispatcher.update_view(view)
        if self._rescheduler is not None:
            self._command(self._rescheduler.urgent(view, self._clock.now))
        homeless, self._homeless = self._homeless, []
        for story in homeless:
            self._dispatch(story)
        self._clock.after(self._config.policy.report_interval, self._report)

    def _reschedule(self) -> None:
        assert self._rescheduler is not None
        self._rescheduler.next_round()
        self._command(self._rescheduler.orders(self._fleet.view, self._clock.now))
        self._clock.after(self._config.policy.interval, self._reschedule)

    def _command(self, orders: list[MoveOrder]) -> None:
        fleet = self._fleet
        for order in orders:
            for _ in range(1 if order.pair.rule in TOGETHER else order.moves):
                self._moves.begin(fleet.view, fleet.instances, order)

    def _scale(self) -> None:
        self._fleet.scale()
        self._clock.after(self._config.scaling_interval, self._scale)

    def _moved(self, pair: Pair, moved: bool, requests: int, blocks: int) -> None:
        assert self._rescheduler is not None  # nothing in the model fails because of a pair
        self._rescheduler.finished(pair, moved, True, requests, blocks)

    def _sample(self) -> None:
        instances = self._fleet.instances.values()
        self._samples.append(sample(self._clock.now, instances, self._moves.under_way))
        self._clock.after(self._config.sample_interval, self._sample)


def sample(now: float, instances: Iterable[SimInstance], migrating: int) -> Sample:
    """The cluster at one moment, with its fragmentation: what the instances hold and want."""
    count = running = waiting = used = total = 0
    blocked = []
    for instance in instances:
        engine = instance.engine
        count += 1
        running += engine.running
        waiting += engine.waiting
        used += engine.used_blocks
        total += engine.config.total_blocks
        if engine.head_blocks > engine.free_blocks:
            blocked.append(engine.head_blocks)
    fragmented = _satisfied(blocked, total - used)
    return Sample(now, count, running, waiting, used, total, fragmented, migrating)


def _satisfied(demands: list[int], free: int) -> int:
    """How much of the demands all that is free would satisfy, the smallest first."""
    satisfied = 0
    for demand in sorted(demands):
        if satisfied + demand > free:
            break
        satisfied += demand
    return satisfied
