"""The queue, the batch and the KV cache of a modelled engine, and how a step is made up."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.request import SimRequest
from llumnix.latency import LatencyProfile


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and how far the engine is with it."""

    request: SimRequest
    seed: int
    order: tuple[int, int]  # place in the queue, and reversed, the order of preemption
    tokens: int  # prompt and outputs so far
    demand: int  # blocks for all of `tokens`, while it waits
    cached: int
    computed: int = 0  # tokens whose KV is in place
    blocks: int = 0
    scheduled: int = 0  # tokens in this step
    preempted: bool = False  # waits, and has run before
    came: int = -1  # how many steps had been made up when it came


def by_order(sequence: Sequence) -> tuple[int, int]:
    """What the queue is sorted by."""
    return sequence.order


@dataclass(slots=True, eq=False)
class Queue:
    """Who waits, in order, and how many KV blocks that asks for."""

    priority: bool  # order by priority, then arrival; else by arrival
    block_size: int
    blocks: int = 0  # asked for by all
    _waiting: list[Sequence] = field(default_factory=list)
    _first: int = 0  # places taken at the front, negative
    _last: int = 0  # places taken at the end

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    @property
    def head(self) -> Sequence | None:
        """Who is next."""
        return self._waiting[0] if self._waiting else None

    def place(self, request: SimRequest, front: bool) -> tuple[int, int]:
        """A place for a request; at the front of those of its priority, where that counts."""
        priority = request.priority if self.priority else 0
        if front:
            self._first -= 1
            return (priority, self._first)
        self._last += 1
        return (priority, self._last)

    def add(self, sequence: Sequence) -> None:
        """Let it wait at its place."""
        sequence.demand = -(-sequence.tokens // self.block_size)
        self.blocks += sequence.demand
        insort(self._waiting, sequence, key=by_order)

    def pop(self) -> Sequence:
        """Take out the head."""
        sequence = self._waiting.pop(0)
        self._leave(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out, wherever it is."""
        self._waiting.remove(sequence)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.blocks -= sequence.demand
        sequence.demand = 0


@dataclass(slots=True, eq=False)
class Work:
    """What one step computes, in the terms of a latency profile."""

    prefill: int = 0  # tokens
    squares: int = 0  # of these, for attention
    batch: int = 0  # requests that decode
    context: int = 0  # tokens of these
    preempted: list[str] = field(default_factory=list)

    def add(self, computed: int, new: int) -> None:
        """Count `new` tokens of a request that has so many already."""
        if new == 1:
            self.batch += 1
            self.context += computed + 1
        elif new:
            self.prefill += new
            self.squares += (2 * computed + new) * new

    def seconds(self, profile: LatencyProfile) -> float:
        """How long it takes."""
        return profile.step_seconds(self.prefill, self.batch, self.context, self.squares)

    def drop(self, computed: int, new: int) -> None:
        """Take back what `add` counted."""
        if new == 1:
            self.batch -= 1
            self.context -= computed + 1
        elif new:
            self.prefill -= new
            self.squares -= (2 * computed + new) * new


@dataclass(slots=True, eq=False)
class Batch:
    """Who runs, who waits, and who holds which share of the KV cache."""

    config: ModelConfig
    queue: Queue = field(init=False)
    running: list[Sequence] = field(default_factory=list, init=False)
    free: int = field(init=False)  # KV blocks
    held: int = field(default=0, init=False)  # KV blocks for requests that are to come
    preemptions: int = field(default=0, init=False)
    steps: int = field(default=0, init=False)  # made up so far

    def __post_init__(self) -> None:
        self.queue = Queue(self.config.priority, self.config.block_size)
        self.free = self.config.total_blocks

    def schedule(self) -> Work:
        """Choose what the next step computes, and take the blocks for it."""
        work = Work()
        if self.config.prefill_first:
            self._prefill(work)
            if not work.prefill:
                self._schedule_running(work)
        else:
            budget = self._schedule_running(work)
            if not work.preempted:
                self._schedule_waiting(work, budget)
        self.steps += 1
        return work

    def add(self, sequence: Sequence) -> None:
        """Queue a request that has come."""
        sequence.came = self.steps
        self.queue.add(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a request's KV blocks back."""
        self.free += sequence.blocks
        sequence.blocks = sequence.computed = sequence.scheduled = 0

    def _schedule_running(self, work: Work) -> int:
        """Give each running request its tokens and blocks; return what is left of the budget."""
        running, block_size = self.running, self.config.block_size
        budget = self.config.max_num_batched_tokens
        index = 0
        while index < len(running) and budget > 0:
            sequence = running[index]
            computed = sequence.computed
            new = sequence.tokens - computed
            if new > budget:
                new = budget
            if computed + new > sequence.blocks * block_size:
                needed = -(-(computed + new) // block_size) - sequence.blocks
                if needed > self.free:
                    victim = self._victim()
                    budget += victim.scheduled
                    work.drop(victim.computed, victim.scheduled)
                    if running.index(victim) < index:
                        index -= 1
                    work.preempted.append(victim.request.id)
                    self._preempt(victim)
                    if victim is sequence:
                        break
                    continue  # the same request tries again
                self.free -= needed
                sequence.blocks += needed
            sequence.scheduled = new
            work.add(computed, new)
            budget -= new
            index += 1
        return budget

    def _victim(self) -> Sequence:
        return max(self.running, key=by_order) if self.config.priority else self.running[-1]

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(victim)
        self.release(victim)
        victim.cached = 0
        victim.preempted = True
        if not self.config.priority:
            victim.order = self.queue.place(victim.request, front=True)
        self.queue.add(victim)

    def _schedule_waiting(self, work: Work, budget: int) -> None:
        """Admit from the queue while tokens and blocks last; a prompt may be cut into chunks."""
        while budget > 0 and (sequence := self._next()) is not None:
            # The last token is always computed, for it is what the next one is sampled from.
            reused = min(sequence.cached, sequence.tokens - 1)
            reused = reused // self.config.block_size * self.config.block_size
            new = min(sequence.tokens - reused, budget)
            self._admit(work, sequence, reused, new)
            budget -= new

    def _prefill(self, work: Work) -> None:
        """Admit whole prompts from the queue; what has its KV cache with it joins the batch."""
        budget = self.config.max_num_batched_tokens
        while (sequence := self._next()) is not None and sequence.tokens <= budget:
            reused = min(sequence.cached, sequence.tokens - 1)
            if reused == sequence.tokens - 1 and reused:
                self._admit(Work(), sequence, reused, 0)
            else:
                self._admit(work, sequence, 0, sequence.tokens)
                budget -= sequence.tokens

    def _next(self) -> Sequence | None:
        """The head of the queue, if there is room for it; nobody overtakes it."""
        head = self.queue.head
        if head is None or len(self.running) >= self.config.max_num_seqs:
            return None
        if self.config.async_scheduling and self.running and head.came == self.steps:
            return None  # this step was made up before it came
        # What has come with its KV cache had its room held for it.
        spare = self.config.watermark_blocks if self.running and not head.cached else 0
        return head if head.demand <= self.free - spare else None

    def _admit(self, work: Work, sequence: Sequence, reused: int, new: int) -> None:
        assert self.queue.pop() is sequence
        sequence.computed, sequence.scheduled = reused, new
        sequence.blocks = -(-(reused + new) // self.config.block_size)
        sequence.preempted = False
        self.free -= sequence.blocks
        self.running.append(sequence)
        work.add(reused, new)

    def check(self) -> None:
        """Verify the books. Raises AssertionError, with a message that says where they fail."""
        config, queue, held = self.config, list(self.queue), self.held
        for sequence in self.running:
            needed = -(-sequence.computed // config.block_size)
            assert sequence.blocks == needed, f"{sequence} should hold {needed} blocks"
            assert sequence.demand == 0 and sequence.scheduled == 0, f"{sequence} is not settled"
            assert sequence.computed < sequence.tokens, f"{sequence} is ahead of its tokens"
            held += sequence.blocks
        assert self.free >= 0 and self.free + held == config.total_blocks, (
            f"{self.free} free and {held} held of {config.total_blocks} blocks"
        )
        for sequence in queue:
            assert sequence.blocks == sequence.computed == 0, f"{sequence} waits and holds KV"
        assert self.queue.blocks == sum(s.demand for s in queue), "demand is miscounted"
        assert queue == sorted(queue, key=by_order), "the queue is out of order"
        assert len(self.running) <= config.max_num_seqs, "the batch is too large"
