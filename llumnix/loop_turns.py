"""Many requests at once, a few in each turn of the loop: tokens get through between two slices."""

import asyncio
from collections import deque
from collections.abc import Callable

AT_ONCE = 16  # requests of one slice: some milliseconds


class Turns:
    """Lets so many requests pass in one turn of the loop; the others wait for the next, in order.

    One prompt with many choices may be more than a slice, and passes whole; the next waits longer.
    """

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = at_once
        self._left = at_once
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._refilling = False

    async def take(self, requests: int = 1) -> None:
        """Wait for the turn of so many requests; at once if there is room in this one."""
        if self._left > 0 and not self._waiting:
            self._pass(requests)
            return
        await self._wait(requests)

    def call(self, work: Callable[[], None]) -> None:
        """Do something in its turn: at once if there is room in this one."""
        if self._left > 0 and not self._waiting:
            self._pass(1)
            work()
        else:
            self._wait(1).add_done_callback(lambda turn: work())

    def _wait(self, requests: int) -> asyncio.Future[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, requests))
        return turn

    def _pass(self, requests: int) -> None:
        self._left -= requests
        if not self._refilling:
            self._refilling = True
            asyncio.get_running_loop().call_soon(self._refill)

    def _refill(self) -> None:
        self._refilling = False
        self._left = min(self._at_once, self._left + self._at_once)
        while self._waiting and self._left > 0:
            turn, requests = self._waiting.popleft()
            if not turn.done():  # else its request has been cancelled
                turn.set_result(None)
                self._pass(requests)
        if (self._waiting or self._left < self._at_once) and not self._refilling:
            self._refilling = True
            asyncio.get_running_loop().call_soon(self._refill)
