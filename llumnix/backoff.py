"""How long to wait before the next try: the one back-off of everything that tries again."""

import random


class Backoff:
    """Doubles from `first` to `longest` seconds, each with up to half taken off at random."""

    def __init__(self, first: float = 0.1, longest: float = 2.0) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def delay(self) -> float:
        """Seconds to wait now."""
        delay, self._next = self._next, min(self._next * 2, self._longest)
        return delay * random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Call it when a try has succeeded."""
        self._next = self._first
