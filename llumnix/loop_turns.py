"""Many requests at once, a few in each turn of the loop: tokens get through between two slices."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

AT_ONCE = 16  # requests of one slice: some milliseconds
SLICE = 0.004  # seconds of the loop's time that one slice may take, whatever its requests cost


class Turns:
    """Lets so many requests pass in one turn of the loop; the others wait for the next, in order.

    One prompt with many choices may be more than a slice, and passes whole; the next waits longer.

    With `seconds` those who wait pass one after the other, each when the one before him is done,
    until so much time has gone: whoever costs more than usual is alone in his turn.
    """

    def __init__(self, at_once: int = AT_ONCE, seconds: float | None = None) -> None:
        self._at_once = at_once
        self._seconds = seconds
        self._first: float | None = None  # when the first of this turn has passed
        self._left = at_once
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._again: deque[tuple[asyncio.Future[None], int]] = deque()  # who had no time, before
        self._refilling = False

    async def take(self, requests: int = 1) -> None:
        """Wait for the turn of so many requests; at once if there is room in this one."""
        if self._left > 0 and not self._waiting and not self._again and self._has_time():
            self._pass(requests)
            return
        await self._wait(self._waiting, requests)
        while not self._has_time():
            self._left += requests
            await self._wait(self._again, requests)

    def call(self, work: Callable[[], None]) -> None:
        """Do something in its turn: at once if there is room in this one."""
        if self._left > 0 and not self._waiting:
            self._pass(1)
            work()
        else:
            self._wait(self._waiting, 1).add_done_callback(lambda turn: work())

    def _wait(
        self, queue: deque[tuple[asyncio.Future[None], int]], requests: int
    ) -> asyncio.Future[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append((turn, requests))
        return turn

    def _has_time(self) -> bool:
        """Whether this turn of the loop has time for one more; for the first it always has."""
        if self._seconds is None:
            return True
        now = time.perf_counter()
        if self._first is None:
            self._first = now
        return now - self._first < self._seconds

    def _pass(self, requests: int) -> None:
        self._left -= requests
        if not self._refilling:
            self._refilling = True
            asyncio.get_running_loop().call_soon(self._refill)

    def _refill(self) -> None:
        self._first = None
        self._left = min(self._at_once, self._left + self._at_once)
        while (queue := self._again or self._waiting) and self._left > 0:
            turn, requests = queue.popleft()
            if not turn.done():  # else its request has been cancelled
                turn.set_result(None)
                self._pass(requests)
        self._refilling = bool(self._again or self._waiting or self._left < self._at_once)
        if self._refilling:  # behind those whose turn it is, in the next turn of the loop
            asyncio.get_running_loop().call_soon(self._refill)
