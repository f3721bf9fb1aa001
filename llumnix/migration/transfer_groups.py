"""Which way KV blocks take between two instances: names of transfer groups, and what has failed."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field

AGAIN = 900.0  # seconds until a way that failed may be tried again

Lives = tuple[str, str]  # of the two engines; another one after a restart


@dataclass(slots=True)
class _Pair:
    lives: Lives
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    skips: int = 0  # ways that could not be set up
    until: float = 0.0  # monotonic; when these are tried again


class Groups:
    """The transfer groups from this node's instances to others.

    A group's name is new after a failure, and when one of the two engines has been restarted: the
    other's end of the former group leads nowhere. A way that could not be set up is not tried again
    between the same two engines for a long while, but the next one; with none left the pair has
    none.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, _Pair] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def name(self, pair: str, lives: Lives) -> str:
        """The group that is in use between two instances, in these lives of their engines."""
        return self._of(pair, lives).name

    def skips(self, pair: str, lives: Lives) -> int:
        """How many ways, from the best on, are not to be tried."""
        return self._of(pair, lives).skips

    def renew(self, pair: str) -> None:
        """Have the next transfer make a new group."""
        if (known := self._pairs.get(pair)) is not None:
            known.name = uuid.uuid4().hex[:12]

    def failed(self, pair: str) -> None:
        """The way that the pair was to take could not be set up: the next one is tried."""
        if (known := self._pairs.get(pair)) is not None:
            known.skips += 1
            known.until = time.monotonic() + AGAIN
            self.renew(pair)

    def lock(self, pair: str) -> asyncio.Lock:
        """Held during a transfer: one at a time, or the two ends would disagree on the order."""
        return self._locks.setdefault(pair, asyncio.Lock())

    def forget(self, instance: str) -> None:
        """An instance is gone."""
        for pair in [p for p in self._pairs if instance in p.split("--")]:
            del self._pairs[pair]
            self._locks.pop(pair, None)

    def _of(self, pair: str, lives: Lives) -> _Pair:
        known = self._pairs.get(pair)
        if known is None or known.lives != lives:
            known = self._pairs[pair] = _Pair(lives)
        if known.skips and time.monotonic() > known.until:
            known.skips = 0
        return known


def pair_name(source: str, destination: str) -> str:
    """Names two instances, in this direction."""
    return f"{source}--{destination}"
