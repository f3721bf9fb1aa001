"""An actor that is started again when it has died, behind one name that stays.

What an actor knows and cannot learn anew is in an object that it is given, and so outlives it; all
else its successor is told once more.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

import pykka

from llumnix.actors.base import A, Handle

logger = logging.getLogger(__name__)

DEATHS = 3  # within DEATHS_SECONDS are a bug that starting again does not mend
DEATHS_SECONDS = 60.0


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
