"""Finds out that an engine hangs: it answers nothing, and its processes do nothing either.

A step may take long, and an engine answers nothing meanwhile; but it computes. So an engine hangs
when it is silent and none of its processes has used the CPU, or one of them is stopped, for
`hang_timeout`; and, whatever it computes, when it is silent for `step_timeout` (a device that hangs
keeps its process spinning).
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

QUIET_SECONDS = 1.0  # without any output, after which an engine is asked for a sign of life
LOOK_SECONDS = 0.5  # between looks at a silent engine's processes
PAUSE_SECONDS = 2.5  # between two looks, from which on it was this process that did nothing


@dataclass(frozen=True, slots=True)
class Activity:
    """What the kernel says of an engine's processes."""

    cpu: int  # nanoseconds on a CPU, of all threads together
    stopped: bool  # one of the processes is (SIGSTOP, a debugger)


def activity(pid: int) -> Activity:
    """Of a process and all its descendants; of those that have ended meanwhile: nothing."""
    cpu, stopped, left = 0, False, [pid]
    while left:
        process = Path(f"/proc/{left.pop()}")
        with contextlib.suppress(OSError, ValueError, IndexError):
            stopped |= (process / "stat").read_text().rpartition(")")[2].split()[0] in "Tt"
            for task in (process / "task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    cpu += int((task / "schedstat").read_text().split()[0])
                    left += map(int, (task / "children").read_text().split())
    return Activity(cpu, stopped)


class Watchdog:
    """Watches one engine that is up, in a task of its own, until it is stopped or has found it
    hanging.

    `ping` asks the engine for a sign of life and returns with its answer, whatever it is.
    `look` tells the activity of its processes. `on_hang` is called once, with what it does.
    """

    def __init__(
        self,
        ping: Callable[[], Awaitable[object]],
        look: Callable[[], Activity],
        on_hang: Callable[[str], None],
        hang_timeout: float,
        step_timeout: float,
    ) -> None:
        self._ping = ping
        self._look = look
        self._on_hang = on_hang
        self._hang_timeout = hang_timeout
        self._step_timeout = step_timeout
        self._heard = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to watch."""
        self._heard = time.monotonic()
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="watchdog")

    def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()

    def heard(self) -> None:
        """The engine has said something; called for each of its steps."""
        self._heard = time.monotonic()

    async def _watch(self) -> None:
        while True:
            quiet = time.monotonic() - self._heard
            if quiet < QUIET_SECONDS:
                await asyncio.sleep(QUIET_SECONDS - quiet)
                continue
            ping = asyncio.ensure_future(self._ping())
            try:
                if finding := await self._wait_for_sign(ping):
                    self._on_hang(finding)
                    return
            finally:
                ping.cancel()
                await asyncio.gather(ping, return_exceptions=True)
            self.heard()

    async def _wait_for_sign(self, ping: "asyncio.Future[object]") -> str | None:
        """Wait until a silent engine says something; else what makes it certain that it hangs."""
        began = asked = moved = looked = time.monotonic()
        last = self._look()
        while True:
            await asyncio.wait([ping], timeout=LOOK_SECONDS)
            now = time.monotonic()
            if ping.done() or self._heard > began:
                return None
            if now - looked > PAUSE_SECONDS:  # this node has been stopped itself
                asked = moved = now
            looked = now
            seen = self._look()
            if seen.cpu != last.cpu and not seen.stopped:
                moved = now
            last = seen
            if now - moved >= self._hang_timeout:
                doing = "one of its processes is stopped" if seen.stopped else "it does nothing"
                return f"it has not answered for {now - self._heard:.1f} s, and {doing}"
            if now - asked >= self._step_timeout:
                return f"it has not answered for {now - self._heard:.0f} s, the longest for a step"
