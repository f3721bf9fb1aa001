"""One simulated instance, a modelled engine that steps on the virtual clock, and that clock."""

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from types import MappingProxyType
from typing import Any

from llumnix.cluster import InstanceId, InstanceInfo, InstanceLoad, InstanceState, kv_blocks
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.model import ModelledEngine
from llumnix.engine.sim.request import SimRequest, StepResult
from llumnix.policy.request_choice import MovableRequest
from llumnix.simulator.result import Story


class VirtualClock:
    """A queue of events; those of one moment happen in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        """Have something happen at a time, or now if that has passed."""
        heappush(self._events, (max(when, self.now), next(self._numbers), what, args))

    def after(self, seconds: float, what: Callable[..., None], *args: Any) -> None:
        """Have something happen so many seconds from now."""
        heappush(self._events, (self.now + seconds, next(self._numbers), what, args))

    def run(self, until: Callable[[], bool], longest: float) -> None:
        """Let things happen until that is so, nothing is left, or the time is up."""
        events = self._events
        while events and not until():
            when, _, what, args = heappop(events)
            if when > longest:
                return
            self.now = when
            what(*args)


NODE = "sim"  # all instances are on one node


class SimInstance:
    """An engine, the requests it has, and the load that it reports."""

    def __init__(self, name: InstanceId, config: ModelConfig, clock: VirtualClock) -> None:
        self.id = name
        self.state = InstanceState.STARTING
        self.engine = ModelledEngine(config)
        self.began = clock.now
        self.stories: dict[str, Story] = {}  # by request id, in the order of arrival
        self.received: Counter[str] = Counter()  # the last sequence number of each dispatcher
        self.changed = True  # since the last report
        self.moves = 0  # copies from and to it, under way
        self.coming = 0  # moves of those that wait, from and to it, under way
        self.slowdown = 0.0  # while there are moves
        # Called with each request that has ended here.
        self.on_end: Callable[[Story], None] = lambda story: None
        self._clock = clock
        self._stepping = False
        self._started: set[str] = set()  # requests that have generated here
        self._boundary: list[Callable[[], None]] = []  # to be done when the step has ended
        self._prefill = 0  # tokens of requests here that have no first token yet

    @property
    def info(self) -> InstanceInfo:
        """It as the cluster knows it."""
        config = self.engine.config
        return InstanceInfo(
            *(self.id, NODE, "model", self.state, config.total_blocks, config.block_size),
            max_running=config.max_num_seqs,
        )

    @property
    def idle(self) -> bool:
        """Whether it has no request, and none is on its way to it."""
        return not self.stories and not self.moves and not self.coming

    def load(self) -> InstanceLoad:
        """What it reports of itself now."""
        engine = self.engine
        priorities = Counter(s.job.priority for s in self.stories.values() if s.job.priority)
        return InstanceLoad(
            self.id,
            running=engine.running,
            waiting=engine.waiting,
            used_blocks=engine.used_blocks,
            waiting_blocks=engine.waiting_blocks,
            head_blocks=engine.head_blocks,
            prefill_tokens=self._prefill,
            preempted=engine.preempted,
            preemptions=engine.preemptions,
            priorities=MappingProxyType(priorities),
            received=MappingProxyType(dict(self.received)),
        )

    def add(self, story: Story, cached: int = 0) -> None:
        """Queue a request; one that has outputs goes on, with so many tokens of its KV cache."""
        job, generated = story.job, len(story.times)
        name = str(job.number)
        self.stories[name] = story
        if not generated:
            self._prefill += job.prompt
        self.engine.add(
            SimRequest(
                name,
                range(job.prompt),
                max_tokens=job.output,
                generated=generated,
                priority=job.priority,
                cached=cached,
                front=generated > 0,
            )
        )
        self.wake()

    def remove(self, name: str) -> Story:
        """Take a request out, wherever it stands."""
        story = self.stories.pop(name)
        self.engine.abort([name])
        self._forget(name, story)
        self.wake()
        return story

    def at_boundary(self, what: Callable[[], None]) -> None:
        """Do something as soon as no step is under way."""
        if self._stepping:
            self._boundary.append(what)
        else:
            what()

    def runs(self, name: str) -> bool:
        """Whether a request is in the batch and has generated something here."""
        return name in self._started and self.stories[name].preempted_at is None

    def candidates(self, leaving: set[str]) -> list[MovableRequest]:
        """Its requests as a rule of choice sees them."""
        size = self.engine.config.block_size
        queued = self.engine.queued()
        head = queued[0] if queued else None  # which may be one that was preempted
        inside = frozenset(queued)
        waiting = frozenset(name for name in queued if name not in self._started)
        found = []
        for order, (name, story) in enumerate(self.stories.items()):
            if name in leaving:
                continue
            tokens = story.job.prompt + len(story.times)
            found.append(
                MovableRequest(
                    request=name,
                    priority=story.job.priority,
                    tokens=tokens,
                    blocks=kv_blocks(tokens, size),
                    running=name not in waiting,
                    order=order,
                    generated=len(story.times),
                    head=name == head,
                    queued=name in inside,
                )
            )
        return found

    def wake(self) -> None:
        """Something has changed: step, if there is anything to do."""
        self.changed = True
        if not self._stepping and self.engine.has_work:
            self._begin()

    def _begin(self) -> None:
        result = self.engine.step()
        now = self._clock.now
        for name in result.preempted:
            story = self.stories[name]
            story.preemptions += 1
            if story.preempted_at is None:
                story.preempted_at = now
        if result.computed:
            self._stepping = True
            seconds = result.seconds * (1 + self.slowdown) if self.moves else result.seconds
            self._clock.after(seconds, self._end, result)

    def _end(self, result: StepResult) -> None:
        self._stepping, self.changed = False, True
        now = self._clock.now
        for name, _, finish in result.outputs:
            story = self.stories.get(name)
            if story is None:
                continue  # it was cut off meanwhile
            if not story.times:
                self._prefill -= story.job.prompt
            self._started.add(name)
            # The client sees it later, all tokens alike, so only the first one's wait grows.
            story.times.append(now + self.engine.config.profile.outside)
            if story.preempted_at is not None:
                story.preemption_loss += max(now - story.preempted_at - result.seconds, 0.0)
                story.preempted_at = None
            if finish:
                del self.stories[name]
                self._forget(name, story)
                self.on_end(story)
        if self._boundary:
            todo, self._boundary = self._boundary, []
            for what in todo:
                what()
        if not self._stepping and self.engine.has_work:
            self._begin()

    def _forget(self, name: str, story: Story) -> None:
        self._started.discard(name)
        if not story.times:
            self._prefill -= story.job.prompt
