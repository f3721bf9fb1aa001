"""Python's garbage collector, kept from standing between two tokens.

A full collection looks at everything that has been made since the start and still lives: with a
thousand open requests that is a tenth of a second, for which every stream waits. By itself Python
begins one in the middle of whatever makes objects, so most often when there is much to look at.
Here it is done when few requests are open, or at last when much may have gathered.
"""

import asyncio
import gc
from collections.abc import Callable

PERIOD = 0.5  # seconds between two looks
FEW = 32  # open requests that are looked at within some milliseconds
DUE = 10  # collections of younger objects after which a full one is due, as Python has it
AT_LAST = 200  # after which it does not wait for a better moment: a million and a half objects
NEVER = 1 << 30


class Garbage:
    """Decides when this process collects all its garbage; young objects are left to Python."""

    def __init__(self, requests: Callable[[], int]) -> None:
        """`requests`: how many are open."""
        self._requests = requests
        self._before = 0  # how many there were at the last look
        self.collections = 0  # full ones that were begun here

    async def watch(self) -> None:
        """Look now and then, until this is cancelled; then Python does it by itself again."""
        young, middle, old = gc.get_threshold()
        gc.set_threshold(young, middle, NEVER)
        try:
            while True:
                await asyncio.sleep(PERIOD)
                self.look()
        finally:
            gc.set_threshold(young, middle, old)

    def look(self) -> None:
        """Collect all garbage if it is due and this is a moment for it."""
        passes = gc.get_count()[2]
        # What has just ended is not all gone yet: a crowd that leaves, leaves in a second.
        before, self._before = self._before, self._requests()
        if passes >= (DUE if max(before, self._before) <= FEW else AT_LAST):
            self.collections += 1
            gc.collect()
