"""Which request leaves: the source of a move chooses among its requests.

A rule is one function from the requests that may go to the one that goes, and one line in `RULES`.
What the destination can take is asked before any rule, by `Room`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class MovableRequest:
    """A request of the source, as far as a rule may know it."""

    request: str
    priority: int  # as vLLM counts: the lower the value, the more important the request
    tokens: int  # of its sequence: prompt and outputs
    blocks: int  # KV blocks that it holds, or asks for while it waits
    running: bool  # in the batch; else queued
    order: int  # its place of arrival: the lower, the earlier
    generated: int  # output tokens so far
    head: bool = False  # next in the queue
    queued: bool = False  # holds no KV cache now: it has not begun yet, or was preempted


_NO_HEADROOM: Mapping[int, int] = MappingProxyType({})


class Room(NamedTuple):
    """What the destination has left, in the terms of freeness F = (M - sum of V) / B (policy/load).

    The load after the move is what counts (the paper's artifact does not look at it): a request
    fits only if it leaves the destination with an F above `floor`. With more than the source's
    F before the move as the floor, the worse off of the two is better off afterwards.

    A request that keeps headroom takes it along, so it goes only to where that is free as well.
    """

    blocks: float  # M - sum of V
    batch: int = 0  # B
    floor: float = -inf  # blocks a request; -inf: whatever fits the memory
    # By priority, of the classes that keep headroom: the blocks that a request of it would keep
    # free there, besides those that are kept already.
    headroom: Mapping[int, int] = _NO_HEADROOM
    places: float = inf  # requests that its batch has place for, besides those there

    def takes(self, candidate: MovableRequest) -> bool:
        """Whether the destination can hold the request, and is left with enough freeness."""
        return self.fits(candidate.blocks + self.headroom.get(candidate.priority, 0))

    def after(self, candidate: MovableRequest) -> "Room":
        """The room left with it there; the next of its class keeps no further headroom."""
        kept = self.headroom.get(candidate.priority, 0)
        headroom = {**self.headroom, candidate.priority: 0} if kept else self.headroom
        return self._replace(
            blocks=self.blocks - candidate.blocks - kept,
            batch=self.batch + 1,
            headroom=headroom,
            places=self.places - 1,
        )

    def fits(self, blocks: float) -> bool:
        """Whether one more request of so many blocks can be held, and enough freeness is left."""
        left = self.blocks - blocks
        return self.places >= 1 and left >= 0 and left / (self.batch + 1) > self.floor


Rule = Callable[[Sequence[MovableRequest], Room], MovableRequest | None]


def lowest_priority(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """Running, of the lowest priority; of these the shortest sequence, and then the last come.

    Source: Llumnix (OSDI'24): the unimportant bear the pause, and the shortest is copied soonest.
    """
    return min(_decoding(candidates), key=lambda c: (-c.priority, c.tokens, -c.order), default=None)


def last_running(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """LCR: of the running requests the one that came last."""
    return max(_decoding(candidates), key=lambda c: c.order, default=None)


def first_running(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """FCR: of the running requests the one that came first."""
    return min(_decoding(candidates), key=lambda c: c.order, default=None)


def shortest_running(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """SR: of the running requests the one with the shortest sequence."""
    return min(_decoding(candidates), key=lambda c: (c.tokens, -c.order), default=None)


def longest_running(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """LR: of the running requests the one with the longest sequence."""
    return max(_decoding(candidates), key=lambda c: (c.tokens, c.order), default=None)


def first_waiting(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """FCW: of the queued requests the one that came first."""
    waiting = (c for c in candidates if not c.running)
    return min(waiting, key=lambda c: c.order, default=None)


def last_waiting(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """Of the queued requests the one that came last."""
    return max((c for c in candidates if not c.running), key=lambda c: c.order, default=None)


def first_behind(candidates: Sequence[MovableRequest], room: Room) -> MovableRequest | None:
    """Of the queued requests behind the head the one that came first."""
    return first_waiting([c for c in candidates if not c.head], room)


def first_waiting_or_shortest_running(
    candidates: Sequence[MovableRequest], room: Room
) -> MovableRequest | None:
    """FCWSR: of the queued ones the first come; when none is queued, the shortest running."""
    return first_waiting(candidates, room) or shortest_running(candidates, room)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "low": lowest_priority,
        "LCR": last_running,
        "SR": shortest_running,
        "LR": longest_running,
        "FCR": first_running,
        "FCW": first_waiting,
        "FCWSR": first_waiting_or_shortest_running,
        "behind": first_behind,
        "queue": first_waiting,
        "tail": last_waiting,
    }
)

# For an instance that drains: the one rule that leaves nothing behind, and what is queued
# goes first, as it has no KV cache to copy and waits in vain.
DRAIN_RULE = "FCWSR"

QUEUE, TAIL = "queue", "tail"  # rules by which many go at once that wait
TOGETHER = frozenset({QUEUE, TAIL})


def choose(candidates: Iterable[MovableRequest], rule: str, room: Room) -> MovableRequest | None:
    """The request that leaves, out of those that the destination takes; None when none can.

    One that keeps headroom leaves only if no other does: it is what the others have to leave for.

    Raises:
        ValueError: there is no rule of that name.
    """
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r} to choose a request; there are {', '.join(RULES)}")
    fitting = [c for c in candidates if room.takes(c)]
    others = [c for c in fitting if c.priority not in room.headroom]
    return RULES[rule](others, room) or RULES[rule](fitting, room)


def choose_together(
    candidates: Iterable[MovableRequest], rule: str, room: Room, count: int
) -> list[MovableRequest]:
    """The requests that leave together: `count` at most, as many as the destination takes.

    By the rule `queue` the most important go first, and of these the first come. By `tail` it is
    the other way round, for where they go they have to wait again; whoever has outputs stays.
    """
    may = (c for c in candidates if c.queued and not (rule == TAIL and c.generated))
    waiting = sorted(may, key=lambda c: (c.priority, c.order))
    chosen: list[MovableRequest] = []
    for candidate in reversed(waiting) if rule == TAIL else waiting:
        if len(chosen) < count and room.takes(candidate):
            chosen.append(candidate)
            room = room.after(candidate)
    return chosen


def _decoding(candidates: Iterable[MovableRequest]) -> Iterable[MovableRequest]:
    """The running requests with an output: in its prefill one has no KV cache worth a copy."""
    return (c for c in candidates if c.running and c.generated > 0)
