"""Which connections may be open, and which of them gives way when there are too many.

A connection costs a descriptor, also one that asks for nothing. So those without a request have
deadlines, and at the limit the one that has been without for longest gives its place to a new one:
first those that never ask, then strangers that have had an answer, and clients' last.
Only when all have requests, new ones are turned away: then probes, operators and other nodes still
get in, by places kept for them. What a connection is for shows in its first head, so such a place
is given to anybody, for no longer than that.

Whoever does not take the answer to a request that needs no key, or has shown none, gives way before
all others. One that is closed counts until its descriptor is free, which its client may delay.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from llumnix.metrics import CLOSED, CONNECTIONS
from llumnix.server.transport.log_throttle import Seldom

logger = logging.getLogger(__name__)

LOOKS = 32  # connections that are looked at to find one that can give way
NEWEST = 16  # connections that do not give way before they had time to ask, if there is another way
PROMPT = 1.0  # seconds in which who connects asks; until then strangers with an answer go first


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many connections there may be, and what each may take; times are in seconds."""

    connections: int = 1024
    reserve: int = 64  # places beyond these, for probes, operators and nodes
    header_timeout: float = 10.0  # for a head to be there, from its first byte
    idle_timeout: float = 75.0  # without a request
    head_bytes: int = 64 * 1024  # of one head
    heads_budget: int = 64 * 2**20  # bytes of all heads that are not whole, less some of each
    send_timeout: float = 300.0  # for which its client may read nothing of an answer; 0: for ever


class Holder(Protocol):
    """A connection, as far as it can be asked to go."""

    @property
    def known(self) -> bool:
        """Whether its last request has shown who has sent it."""

    @property
    def unsent(self) -> int:
        """Bytes that its client has not taken yet."""

    def end(self) -> None:
        """Close it."""

    def hang_up(self) -> None:
        """Cut it off."""

    def expect(self) -> None:
        """Have its client take what is unsent soon, or be cut off."""


class Places:
    """The books of one node's connections."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._open: set[Holder] = set()
        self._extra: dict[Holder, None] = {}  # those in reserved places
        # Those without a request, the oldest first, with the time since which they are.
        self._heads: dict[Holder, float] = {}  # of which a head is to come
        # Which have had an answer, and have not asked again: clients, and strangers.
        self._idle: dict[Holder, float] = {}
        self._answered: dict[Holder, float] = {}
        self._stuck: dict[Holder, None] = {}  # strangers that have not taken their answers
        self._closing: dict[Holder, None] = {}  # that have been ended, and have descriptors still
        self._full = Seldom(
            logger, f"all {limits.connections} connections have requests; refused %d more"
        )
        self._slow = Seldom(logger, "closed %d connections on which no whole head came in time")

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def enter(self, holder: Holder) -> None:
        """A connection has been made; it, or another one, may be ended for it."""
        over = len(self._open) + len(self._closing) - len(self._extra) - self._limits.connections
        for closing in list(islice(self._closing, max(over + 1, 0))):
            del self._closing[closing]
            closing.hang_up()
        if len(self._open) - len(self._extra) >= self._limits.connections:
            if self._displace(NEWEST):
                pass
            elif self._reserve():
                self._extra[holder] = None
            elif not self._displace():
                self.refuse()
                holder.hang_up()
                return
        self._open.add(holder)
        self._heads[holder] = self._clock()
        CONNECTIONS.inc()

    def leave(self, holder: Holder) -> None:
        """A connection has ended."""
        if holder in self._open:
            self._open.remove(holder)
            CONNECTIONS.dec()
        self.begin(holder)
        self._extra.pop(holder, None)
        self._stuck.pop(holder, None)
        self._closing.pop(holder, None)

    def stir(self, holder: Holder) -> None:
        """Bytes have come that belong to no request yet."""
        if holder in self._idle or holder in self._answered:
            self.begin(holder)
            self._heads[holder] = self._clock()

    def begin(self, holder: Holder) -> None:
        """A request has come: it is none of those without one."""
        self._heads.pop(holder, None)
        self._idle.pop(holder, None)
        self._answered.pop(holder, None)

    def rest(self, holder: Holder) -> None:
        """Its request has ended."""
        if holder in self._open:
            group = self._idle if holder.known else self._answered
            group[holder] = self._clock()

    def stick(self, holder: Holder) -> None:
        """A stranger has not taken all of his answer."""
        if holder in self._open:
            self._stuck[holder] = None

    def unstick(self, holder: Holder) -> None:
        """It was none."""
        self._stuck.pop(holder, None)

    def move(self, holder: Holder) -> bool:
        """Give a reserved place back for another one, if one without a request has that."""
        if len(self._open) - len(self._extra) >= self._limits.connections and not self._displace():
            return False
        self._extra.pop(holder, None)
        return True

    def reserved(self, holder: Holder) -> bool:
        """Whether its place is one of those kept for probes, operators and nodes."""
        return holder in self._extra

    def refuse(self) -> None:
        """A connection has been turned away as there are too many."""
        self._full.count()
        CLOSED.labels("refused").inc()

    def expire(self) -> None:
        """End those whose time is over."""
        now = self._clock()
        for holder in _older(self._heads, now - self._limits.header_timeout):
            self._end(holder, "head")
            self._slow.count()
        for group in self._idle, self._answered:
            for holder in _older(group, now - self._limits.idle_timeout):
                if holder.unsent:  # its answer is not over for its client
                    holder.expect()
                    del group[holder]
                    group[holder] = now
                else:
                    self._end(holder, "idle")

    def _reserve(self) -> bool:
        """Whether a reserved place is free; one that has asked for nothing gives it back."""
        if len(self._extra) < self._limits.reserve:
            return True
        silent = next((other for other in self._extra if other in self._heads), None)
        if silent is None:
            return False
        self._end(silent, "displaced")
        return True

    def _displace(self, newest: int = 0) -> bool:
        """End one for another; not the `newest` ones of which a head is to come."""
        waiting = next(self._giving_way(newest), None)
        if waiting is not None:
            self._end(waiting, "displaced")
        return waiting is not None

    def _giving_way(self, newest: int) -> Iterator[Holder]:
        for holder in list(islice(self._stuck, LOOKS)):
            if not holder.unsent:
                del self._stuck[holder]
            elif holder not in self._extra:
                yield holder
        looks = LOOKS + len(self._extra)
        heads = dict(islice(self._heads.items(), looks))
        silent = _older(heads, self._clock() - PROMPT)
        fresh = list(heads)[len(silent) : max(0, len(self._heads) - newest)]
        answered, idle = (islice(group, looks) for group in (self._answered, self._idle))
        for holder in [*silent, *answered, *fresh, *idle]:
            if holder not in self._extra and not holder.unsent:
                yield holder

    def _end(self, holder: Holder, reason: str) -> None:
        self.leave(holder)
        self._closing[holder] = None
        CLOSED.labels(reason).inc()
        holder.end()


def _older(group: dict[Holder, float], moment: float) -> list[Holder]:
    """Those that have been in the group since before that moment, of which it is in order."""
    found = []
    for holder, since in group.items():
        if since > moment:
            break
        found.append(holder)
    return found
