"""Finds out that an engine hangs: it answers nothing and does nothing, though it could.

A step may take long, and an engine answers nothing meanwhile; but it computes. And a machine that
is short of CPU or memory makes everybody slow. So an engine hangs when for `hang_timeout` it has
been silent and none of its processes has used the CPU, while the machine had time to give; or when
one of them is stopped; and, whatever it does, when it is silent for `step_timeout` (a device that
hangs keeps its process spinning).
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llumnix.cluster import InstanceId

logger = logging.getLogger(__name__)

QUIET_SECONDS = 1.0  # without any output, after which an engine is asked for a sign of life
LOOK_SECONDS = 0.5  # between looks at a silent engine's processes
SLACK_SECONDS = 0.1  # by which a look may be late without the node's having been short of time
PAGING = 0.1  # share of the time in which something waited for memory or a disk: a shortage
FRESH_SECONDS = 1.5  # an engine that is well has answered within: it is asked after one in silence
_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")  # nanoseconds


@dataclass(frozen=True, slots=True)
class Activity:
    """What the kernel says of a process and its descendants at one moment."""

    cpu: int  # nanoseconds on a CPU, of all threads together
    stopped: bool = False  # one of the processes is (SIGSTOP, a debugger)
    wants_cpu: bool = False  # a thread computes, or could if a CPU had time for it
    in_kernel: bool = False  # a thread waits for memory, a disk, a driver: no signal reaches it


def activity(pid: int) -> Activity:
    """Of a process and all its descendants; of those that have ended meanwhile: nothing."""
    cpu, left, states = 0, [pid], set[str]()
    while left:
        process = Path(f"/proc/{left.pop()}")
        with contextlib.suppress(OSError):
            for task in (process / "task").iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    state, used = _thread(task)
                    states.add(state)
                    cpu += used
                    left += map(int, (task / "children").read_text().split())
    return Activity(cpu, not states.isdisjoint("Tt"), "R" in states, "D" in states)


def _thread(task: Path) -> tuple[str, int]:
    """A thread's state, and the nanoseconds that it has been on a CPU."""
    fields = (task / "stat").read_text().rpartition(")")[2].split()
    try:
        return fields[0], int((task / "schedstat").read_text().split()[0])
    except FileNotFoundError:  # some kernels count ticks only
        return fields[0], (int(fields[11]) + int(fields[12])) * _TICK


class Machine:
    """Whether this machine has had time to give: what all engines of a node share.

    The node's loop alone calls it.
    """

    def __init__(
        self,
        pressure: Path = Path("/proc/pressure"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pressure = pressure
        self._clock = clock
        self._heard: dict[InstanceId, float] = {}

    def heard(self, instance: InstanceId, when: float) -> None:
        """An engine has answered, or brought outputs, at this time (monotonic)."""
        self._heard[instance] = when

    def others_progress(self, instance: InstanceId) -> bool:
        """Whether another engine of this node has answered just now."""
        since = self._clock() - FRESH_SECONDS
        return any(when > since for other, when in self._heard.items() if other != instance)

    def stalled(self) -> float | None:
        """Seconds in which something here waited for memory or a disk, since the start of time.

        None where the kernel does not tell.
        """
        try:
            return max(_total(self._pressure / name) for name in ("memory", "io"))
        except (OSError, ValueError, IndexError):
            return None


def _total(file: Path) -> float:
    """The microseconds at the end of its first line: some avg10=0.00 … total=1234."""
    return int(file.read_text().splitlines()[0].rpartition("total=")[2]) / 1e6


@dataclass(frozen=True)
class Patience:
    """How long an engine may take; all in seconds."""

    start: float = 600.0  # to come up
    hang: float = 3.0  # to say or do anything at all
    step: float = 300.0  # for one step


class Look(NamedTuple):
    """What is seen of a silent engine, and around it, at one moment."""

    seconds: float  # since the look before
    activity: Activity
    paging: bool | None = None  # whether the machine waited for memory or a disk; None: not known
    others: bool = False  # whether another engine of the node makes progress


class Case:
    """What speaks for it that a silent engine hangs, gathered from look to look."""

    def __init__(self, first: Activity) -> None:
        self._last = first
        self.idle = 0.0  # seconds for which it has done nothing though it could
        self.waited = 0.0  # seconds for which this node has looked

    def add(self, look: Look) -> None:
        """Take in one more look."""
        seen, before = look.activity, self._last
        self._last = seen
        # More than that has passed only if this node itself was stopped, or had no time.
        there = min(look.seconds, LOOK_SECONDS)
        late = max(look.seconds - LOOK_SECONDS - SLACK_SECONDS, 0.0)
        self.waited += there
        if seen.stopped:
            self.idle += there
        elif seen.cpu != before.cpu:
            self.idle = 0.0
        elif seen.wants_cpu or (seen.in_kernel and look.paging is not False):
            return  # it would go on if the machine let it
        elif look.others:
            self.idle += there
        elif not look.paging:
            self.idle += max(there - late, 0.0)

    @property
    def doing(self) -> str:
        """What it does while it is idle."""
        return "one of its processes is stopped" if self._last.stopped else "it does nothing"


class Watchdog:
    """Watches one engine that is up, in a task of its own, until it is stopped or has found it
    hanging.

    `ping` asks the engine for a sign of life and ends with its answer, whatever it is.
    `look` tells the activity of its processes. `on_hang` is called once, with what it does.
    `machine` is what it has in common with the other engines of its node.
    """

    def __init__(
        self,
        instance: InstanceId,
        ping: Callable[[], Awaitable[object]],
        look: Callable[[], Activity],
        on_hang: Callable[[str], None],
        patience: Patience,
        machine: Machine,
    ) -> None:
        self._instance = instance
        self._ping = ping
        self._look = look
        self._on_hang = on_hang
        self._patience = patience
        self._machine = machine
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
        self._machine.heard(self._instance, self._heard)

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
        began = looked = time.monotonic()
        case, stalled = Case(self._look()), self._machine.stalled()
        while True:
            await asyncio.wait([ping], timeout=LOOK_SECONDS)
            now = time.monotonic()
            if ping.done() or self._heard > began:
                return None
            seconds, looked = now - looked, now
            stalled, before = self._machine.stalled(), stalled
            others = self._machine.others_progress(self._instance)
            case.add(Look(seconds, self._look(), _paging(before, stalled, seconds), others))
            silent = now - self._heard
            if case.idle >= self._patience.hang:
                return f"it has not answered for {silent:.1f} s, and {case.doing}"
            if case.waited >= self._patience.step:
                return f"it has not answered for {silent:.0f} s, the longest for a step"


def _paging(before: float | None, now: float | None, seconds: float) -> bool | None:
    if before is None or now is None:
        return None
    return now - before >= PAGING * seconds
