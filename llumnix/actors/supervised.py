"""An actor that is started again when it has died, behind one name that stays.

What an actor knows and cannot learn anew is in an object that it is given, and so outlives it; all
else its successor is told once more.
"""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pykka

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


class Supervised:
    """Stands for an actor and its successors, and is used like the proxy of one.

    `start` makes the actor, each time; `inform` tells a new one, by its proxy, what it must know.
    """

    def __init__(
        self,
        start: Callable[[], pykka.ActorRef[Any]],
        inform: Callable[[Any], None] = lambda proxy: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._inform = inform
        self._deaths = Deaths(clock)
        self._actor = start()
        self._proxy: Any = self._actor.proxy()
        inform(self._proxy)

    def __getattr__(self, name: str) -> Any:
        """The messages of the actor that lives now; to a dead one they raise ActorDeadError."""
        return getattr(self._proxy, name)

    def notify(self, message: str, *arguments: Any) -> None:
        """Tell the actor something; nobody hears it if it has just died.

        That is for what its successor is told anyway, or need not know.
        """
        with contextlib.suppress(pykka.ActorDeadError):
            getattr(self._proxy, message).defer(*arguments)

    @property
    def name(self) -> str:
        """The kind of actor."""
        return self._actor.actor_class.__name__

    @property
    def alive(self) -> bool:
        """Whether it lives."""
        return self._actor.is_alive()

    @property
    def hopeless(self) -> bool:
        """Whether it has died so often lately that starting it again and again does not help."""
        return self._deaths.too_many

    def start_again(self) -> None:
        """Start a successor of one that has died."""
        self._deaths.count()
        self._actor = self._start()
        self._proxy = self._actor.proxy()
        self._inform(self._proxy)
        logger.warning("%s has died and was started again", self.name)

    def stop(self, within: float) -> None:
        """End the actor; blocks for so many seconds at most, and then raises pykka.Timeout."""
        self._actor.stop(timeout=within)
