"""What an engine's processes do, as the kernel tells it: compute, wait, sleep, or stand still."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

_TICK = 1_000_000_000 // os.sysconf("SC_CLK_TCK")  # nanoseconds


@dataclass(frozen=True, slots=True)
class Activity:
    """What the kernel says of a process and its descendants at one moment."""

    cpu: int  # nanoseconds on a CPU, of all threads together
    stopped: bool = False  # one of the processes is (SIGSTOP, a debugger)
    wants_cpu: bool = False  # a thread computes, or could if a CPU had time for it
    in_kernel: bool = (
        False  # a thread waits where no signal reaches it: for memory, a disk, a driver
    )


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
