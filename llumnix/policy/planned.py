"""What a leader has planned, and the loads do not show yet.

A room that was promised must not be promised again. So what a move brings counts at its destination
from the moment at which it is planned, and what it takes counts at its source, until the move has
ended and the reports that come afterwards cover it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from llumnix.cluster import ClusterView, InstanceId, InstanceLoad
from llumnix.policy.rebalance import Pair
from llumnix.policy.select import TOGETHER

REPORTS = 2  # the first after the end of a move may have been on its way before
TICKS = 3  # after which an instance has reported, or nothing has changed there


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
    """The books of one leader's term; a plain object without threads or clock."""

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
        shares = [*self._over, *_flat(self._under_way.values())]
        if not shares:
            return view
        loads = dict(view.loads)
        for share in shares:
            if share.instance in loads:
                loads[share.instance] = share.on(loads[share.instance])
        return replace(view, loads=loads)


def _flat(many: Iterable[list[tuple[_Share, _Share]]]) -> Iterable[_Share]:
    for shares in many:
        for both in shares:
            yield from both
