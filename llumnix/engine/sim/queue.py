"""The requests of a modelled engine, each by itself and in its queue."""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from llumnix.engine.sim.request import SimRequest


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
