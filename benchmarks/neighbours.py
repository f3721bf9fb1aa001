"""What other processes take of the machine while something is measured."""

import time

import psutil


class Neighbours:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy(), _own()

    @property
    def cores(self) -> float:
        """Cores that all other processes have kept busy on average."""
        seconds = time.monotonic() - self._began
        others = (_busy() - self._busy) - (_own() - self._own)
        return round(max(others, 0.0) / max(seconds, 1e-9), 2)


def _busy() -> float:
    """CPU seconds of the whole machine."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own() -> float:
    """CPU seconds of this process and of all that it has started."""
    here = psutil.Process()
    seconds = 0.0
    for process in (here, *here.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds
