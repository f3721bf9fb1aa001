"""How many bytes images, sounds and videos may become: those of a request, and of all of a node's.

What is decoded stays until it is processed, where requests wait for one another; so many requests
that are each within their budget would together take all memory of a machine.
"""

import asyncio
import contextlib
import threading
from collections import deque
from contextvars import ContextVar

from llumnix.metrics import REFUSALS

STILL_BYTES = 2**30  # of all images and sounds of a request: six of the largest images of vLLM's
VIDEO_BYTES = 6 * 2**30  # of all its videos: 768 frames of 1080 lines, the most that a model asks
STILL, VIDEO = "images and sounds", "videos"
PATIENCE = 10.0  # seconds for which a file may wait for room


class NoRoom(Exception):
    """A file can't be decoded now, as there is too much already."""

    def __init__(self, size: int) -> None:
        super().__init__(f"no room for {size} bytes")
        self.size = size
        self.data: bytes | None = None  # the file, if all of it is at hand


class MediaRoom:
    """What all requests of a node have decoded at a time.

    Of those that wait with a part of their files decoded, one at a time may have all that it asks
    for, whatever the others hold: else they would wait for each other.
    """

    def __init__(self, most: int = 0) -> None:
        """`most`: bytes; 0: no limit."""
        self._most = most
        self._lock = threading.Lock()  # files are decoded in several threads
        self._held = 0
        # What is given back, by whichever thread drops an object last, perhaps in a collection of
        # garbage while it has the lock; so that waits here.
        self._returned: deque[tuple[MediaBudget, int]] = deque()
        self._ahead: MediaBudget | None = None  # the one that may have all
        self._waiting: dict[asyncio.Future[None], tuple[MediaBudget, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def held(self) -> int:
        """Bytes."""
        with self._lock:
            self._settle()
            return self._held

    def take(self, budget: "MediaBudget", size: int) -> None:
        """Hold so many bytes for a request. Raises NoRoom."""
        with self._lock:
            self._settle()
            behind = self._waiting and not budget.held  # one that has nothing yet
            full = self._held + size > self._most
            if self._most and (behind or full) and budget is not self._ahead:
                raise NoRoom(size)
            self._hold(budget, size)

    def give(self, budget: "MediaBudget", size: int) -> None:
        """They are free again; from any thread, at any moment."""
        self._returned.append((budget, size))
        self._stir()

    def leave(self, budget: "MediaBudget") -> None:
        """A request is over, though some of its files may be held for a little."""
        budget.over = True
        self._stir()

    async def wait(self, budget: "MediaBudget", size: int) -> None:
        """Hold so many bytes as soon as there is room, in turn. Raises TimeoutError."""
        self._loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting[turn] = budget, size
        try:
            async with asyncio.timeout(PATIENCE):
                self._admit()
                await turn
        except BaseException:
            if self._waiting.pop(turn, None) is None:
                self.give(budget, size)  # too late
            raise

    def _hold(self, budget: "MediaBudget", size: int) -> None:
        self._held += size
        budget.held += size
        budget.idle = False

    def _stir(self) -> None:
        if self._waiting and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._admit)

    def _settle(self) -> None:
        while self._returned:
            budget, size = self._returned.popleft()
            self._held -= size
            budget.held -= size
        ahead = self._ahead
        if ahead is not None and (ahead.over or not (ahead.held or ahead.idle)):
            self._ahead = None

    def _admit(self) -> None:
        """Let those go on for whom there is room, and one for whom there is none."""
        with self._lock:
            self._settle()
            blocked = False
            for turn, (budget, size) in list(self._waiting.items()):
                free = self._most - self._held
                if turn.done():  # its client has left
                    continue
                if size > free and self._ahead is None:
                    self._ahead, budget.idle = budget, True
                elif budget is not self._ahead and (blocked or size > free):
                    blocked = True  # those behind it wait too, but for the one that may have all
                    continue
                self._hold(budget, size)
                del self._waiting[turn]
                turn.set_result(None)


class MediaBudget:
    """What one request's media may still become."""

    def __init__(
        self, still: int = STILL_BYTES, video: int = VIDEO_BYTES, room: MediaRoom | None = None
    ) -> None:
        """`room`: what all requests share; None: nothing."""
        self.room = room if room is not None else MediaRoom()
        self.held = 0  # bytes in there
        self.idle = self.over = False  # whether it has asked for nothing since it may have all
        self._lock = threading.Lock()  # they are decoded in several threads
        self._most = {STILL: still, VIDEO: video}
        self._left = dict(self._most)

    def take(self, kind: str, size: int) -> None:
        """Raise ValueError if this is more than is left."""
        with self._lock:
            if size <= self._left[kind]:
                self._left[kind] -= size
                return
        REFUSALS.labels("content").inc()
        most = self._most[kind] // 2**20
        raise ValueError(f"the {kind} of a request must have at most {most} MiB when decoded")

    def give(self, kind: str, size: int) -> None:
        """It has not become that, and is tried again."""
        with self._lock:
            self._left[kind] += size


# That of the request whose task this is; None outside of one.
media_budget: ContextVar[MediaBudget | None] = ContextVar("media_budget", default=None)
