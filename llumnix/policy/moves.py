"""The moves that a leader has under way, and the pairs that rest since theirs failed.

The unit of time is the tick, one interval of rescheduling.
"""

from collections import Counter, deque
from dataclasses import dataclass

from llumnix.cluster import InstanceId
from llumnix.policy.rebalance import Pair
from llumnix.policy.select import TOGETHER

BACKOFF_LONGEST = 32  # ticks that a pair rests after failures in a row: 2, 4, 8, …


@dataclass(slots=True)
class _Setback:
    failures: int  # in a row
    until: int  # the tick at which the pair may be tried again


class MovesUnderWay:
    """The moves of one leader's term; a plain object without threads or clock."""

    def __init__(self, patience: int) -> None:
        """Begin with none; a move that has not ended `patience` ticks later has failed."""
        self._patience = patience
        self._now = 0
        self._due: dict[Pair, deque[int]] = {}  # the tick by which each move must have ended
        self._busy: Counter[InstanceId] = Counter()  # moves from and to each instance
        self._setbacks: dict[Pair, _Setback] = {}
        self._tried: set[Pair] = set()  # in this tick, by those that wait, in vain
        self._again: dict[Pair, int] = {}  # the tick from which on those may be tried again

    def next_tick(self) -> list[Pair]:
        """Go on by a tick; the pairs of moves that got no answer in time, which are given up."""
        self._now += 1
        late = [pair for pair, due in self._due.items() for tick in due if tick <= self._now]
        for pair in late:
            self.end(pair, moved=False)
        # A pair that has not failed for so long starts over.
        old = [p for p, s in self._setbacks.items() if self._now > s.until + BACKOFF_LONGEST]
        for pair in old:
            del self._setbacks[pair]
        self._tried.clear()
        self._again = {p: tick for p, tick in self._again.items() if tick > self._now}
        return late

    def of(self, instance: InstanceId) -> int:
        """How many moves from and to an instance are under way."""
        return self._busy[instance]

    def rest(self, pair: Pair) -> int:
        """For how many ticks a pair is to rest."""
        setback = self._setbacks.get(pair)
        until = max(setback.until if setback else 0, self._again.get(pair, 0))
        return max(until - self._now, 0)

    def busy(self, pair: Pair) -> bool:
        """Whether a move of just this pair, and by its rule, is under way."""
        return pair in self._due

    def vacant(self, pair: Pair, limit: int) -> int:
        """How many moves a pair can begin, if none of both is to have more than `limit`."""
        if self.rest(pair):
            return 0
        return limit - max(self._busy[pair.source], self._busy[pair.destination])

    def begin(self, pair: Pair) -> None:
        """Count a move. One of requests that wait copies nothing, and keeps no instance busy."""
        self._due.setdefault(pair, deque()).append(self._now + self._patience)
        if pair.rule not in TOGETHER:
            self._busy.update((pair.source, pair.destination))

    def end(self, pair: Pair, moved: bool, blameless: bool = False) -> bool:
        """Count a move no more; whether there was one.

        A failure is `blameless` if it says nothing about the pair: the request has ended, or there
        was no room for any. Then it may be tried again from the next tick on, and no later; those
        that wait together may be tried once more at once.
        """
        due = self._due.get(pair)
        if due is None:
            return False
        due.popleft()
        if not due:
            del self._due[pair]
        if pair.rule not in TOGETHER:
            self._busy.subtract((pair.source, pair.destination))
        if moved:
            self._setbacks.pop(pair, None)
        elif blameless and pair.rule in TOGETHER and pair not in self._tried:
            self._tried.add(pair)  # it costs a message, and those that wait shall not
        elif blameless:
            self._again[pair] = self._now + 1
        elif not self.rest(pair):  # moves that fail together are one setback
            failures = self._setbacks[pair].failures + 1 if pair in self._setbacks else 1
            self._setbacks[pair] = _Setback(failures, self._now + min(2**failures, BACKOFF_LONGEST))
        return True
