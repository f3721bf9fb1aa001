"""The moves that a leader has under way, what they change, and which pairs rest after failures.

The unit of time is the tick, one interval of rescheduling.
"""

from collections import Counter, deque
from dataclasses import dataclass, replace
from itertools import chain

from llumnix.cluster import ClusterView, InstanceId, InstanceLoad
from llumnix.policy.rebalance import Pair
from llumnix.policy.request_choice import TOGETHER

BACKOFF_LONGEST = 32  # ticks that a pair rests after failures in a row: 2, 4, 8, …
REPORTS = 2  # the first after the end of a move may have been on its way before
TICKS = 3  # after which an instance has reported, or nothing has changed there


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


@dataclass(slots=True)
class _Share:
    """What one move changes at one of its instances."""

    instance: InstanceId
    requests: int
    blocks: int
    queued: bool  # whether these wait, where they are
    sign: int
    last: InstanceLoad | None = None  # since the move has ended
    reports: int = 0
    until: int = 0  # the tick from which on it does not count any more

    def on(self, load: InstanceLoad) -> InstanceLoad:
        """The load of that instance, with this share."""
        requests, blocks = self.sign * self.requests, self.sign * self.blocks
        if self.queued:
            waiting = max(load.waiting + requests, 0)
            asked = max(load.waiting_blocks + blocks, 0) if waiting else 0
            return replace(
                load,
                waiting=waiting,
                waiting_blocks=asked,
                head_blocks=min(load.head_blocks, asked),
            )
        return replace(
            load,
            running=max(load.running + requests, 0),
            used_blocks=max(load.used_blocks + blocks, 0),
        )


class Planned:
    """What a leader has planned in its term, and the loads do not show yet.

    A room that was promised must not be promised again. So what a move brings counts at its
    destination from the moment at which it is planned, and what it takes counts at its source,
    until the move has ended and the reports that come afterwards cover it.
    """

    def __init__(self) -> None:
        self._now = 0  # ticks
        self._under_way: dict[Pair, list[tuple[_Share, _Share]]] = {}
        self._over: list[_Share] = []

    def begin(self, pair: Pair, requests: int, blocks: int) -> None:
        """Count so many requests and blocks as on their way from the one to the other."""
        queued = pair.rule in TOGETHER
        leaves = _Share(pair.source, requests, blocks, queued, -1)
        comes = _Share(pair.destination, requests, blocks, pair.rule == "tail", 1)
        self._under_way.setdefault(pair, []).append((leaves, comes))

    def end(self, pair: Pair, requests: int, blocks: int | None) -> None:
        """Count a move as done, of so many requests and blocks (None: as was thought)."""
        shares = self._under_way.get(pair)
        if not shares:
            return
        ended = shares.pop(0)
        if not shares:
            del self._under_way[pair]
        for share in ended if requests else ():
            share.requests = requests
            share.blocks = share.blocks if blocks is None else blocks
            share.until = self._now + TICKS
            self._over.append(share)

    def next_tick(self) -> None:
        """Go on by a tick, and forget what is over for long enough."""
        self._now += 1
        self._over = [share for share in self._over if share.until > self._now]

    def seen(self, view: ClusterView) -> None:
        """Forget what the reports of this view cover."""
        for share in self._over:
            load = view.loads.get(share.instance)
            if load != share.last:
                share.reports += share.last is not None
                share.last = load
        self._over = [share for share in self._over if share.reports < REPORTS]

    def on(self, view: ClusterView) -> ClusterView:
        """The view as it will be, once all that is planned has been done."""
        under_way = chain.from_iterable(self._under_way.values())
        shares = [*self._over, *chain.from_iterable(under_way)]
        if not shares:
            return view
        loads = dict(view.loads)
        for share in shares:
            if share.instance in loads:
                loads[share.instance] = share.on(loads[share.instance])
        return replace(view, loads=loads)
