"""Sees that a node's actors live: starts them again under the same name, or gives the node up.

What an actor knows and cannot learn anew is in an object that it is given, and so outlives it; all
else its successor is told once more.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pykka

from llumnix.actors.base import ASK_SECONDS, A, Actor, Handle

logger = logging.getLogger(__name__)

DEATHS = 3  # within DEATHS_SECONDS are a bug that starting again does not mend
DEATHS_SECONDS = 60.0
LOOK_SECONDS = 0.1


class Deaths:
    """Counts what dies again and again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=DEATHS)

    def count(self) -> None:
        """One more death, now."""
        self._times.append(self._clock())

    @property
    def too_many(self) -> bool:
        """Whether there were DEATHS of them within the last DEATHS_SECONDS."""
        return len(self._times) == DEATHS and self._clock() - self._times[0] < DEATHS_SECONDS


class Supervised(Handle[A]):
    """The handle of an actor and of its successors: calls go to the one that lives now.

    `start` makes the actor, each time; `inform` tells a new one what it must know.
    """

    def __init__(
        self,
        start: Callable[[], pykka.ActorRef[A]],
        inform: Callable[[Handle[A]], None] = lambda actor: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(start())
        self._start = start
        self._inform = inform
        self._deaths = Deaths(clock)
        inform(self)

    @property
    def name(self) -> str:
        """The kind of actor."""
        return self._actor.actor_class.__name__

    @property
    def hopeless(self) -> bool:
        """Whether it has died so often lately that starting it again and again does not help."""
        return self._deaths.too_many

    def start_again(self) -> None:
        """Start a successor of one that has died."""
        self._deaths.count()
        self._actor = self._start()
        self._inform(self)
        logger.warning("%s has died and was started again", self.name)


class Supervision:
    """The actors of a node in the order in which they were started; lives on its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, give_up: Callable[[str], None]) -> None:
        self._loop = loop
        self._give_up = give_up  # called once, with a sentence: the node has to end
        self._actors: list[Supervised[Any]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._gave_up = ""
        self._look()

    def keep(
        self,
        start: Callable[[], pykka.ActorRef[A]],
        inform: Callable[[Handle[A]], None] = lambda actor: None,
    ) -> Supervised[A]:
        """Start an actor and keep it alive from now on; see Supervised."""
        actor = Supervised(start, inform)
        actor.ask(Actor.ping).get(timeout=ASK_SECONDS)
        self._actors.append(actor)
        return actor

    @property
    def fault(self) -> str:
        """Why the node had to be given up; empty if it was not."""
        return self._gave_up

    def give_up(self, fault: str) -> None:
        """Have the node end, cleanly, for that reason."""
        if not self._gave_up:
            self._gave_up = fault
            logger.critical("%s, so this node leaves", fault)
            self._give_up(fault)

    def stop(self) -> None:
        """End all actors, the last one first; blocks for ASK_SECONDS for each that is blocked."""
        if self._timer is not None:
            self._timer.cancel()
        for actor in reversed(self._actors):
            try:
                actor.stop(ASK_SECONDS)
            except pykka.Timeout:  # as when etcd is silent; its thread ends with the process
                logger.warning("%s has not ended within %g s", actor.name, ASK_SECONDS)

    def _look(self) -> None:
        for actor in self._actors:
            if actor.alive or actor.hopeless:
                continue
            actor.start_again()  # the last one too, by which the node drains
            if actor.hopeless:
                self.give_up(f"{actor.name} dies again and again")
        self._timer = self._loop.call_later(LOOK_SECONDS, self._look)
