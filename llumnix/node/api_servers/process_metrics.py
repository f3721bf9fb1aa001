"""Metrics where a node's API servers are processes: each writes its own into files of the node.

prometheus_client adds them up at a scrape, those of processes that have ended among them.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from llumnix.metrics import DISPATCHES, DROPPED_OUTPUTS, OPEN_REQUESTS, Counts

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's
GONE = 0  # the number under which those that have ended count together; no process has it
EVERY = 1.0  # seconds between two writings


def forget_process(pid: int) -> None:
    """Add what a process that has ended has counted to that of all that have, and drop its gauges.

    Else each server that is started again would leave files, all of which each scrape reads. Waits
    for scrapes that are under way.
    """
    folder = Path(os.environ[FOLDER])
    with _files(folder, fcntl.LOCK_EX):
        for kind in ("counter", "histogram", "summary"):
            file = folder / f"{kind}_{pid}.db"
            if file.exists():
                _add(file, folder / f"{kind}_{GONE}.db")
        for file in folder.glob(f"*_{pid}.db"):
            file.unlink(missing_ok=True)


def scrape_files() -> bytes:
    """All that the processes of this node have counted, as Prometheus reads it."""
    folder = os.environ[FOLDER]
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]
    with _files(Path(folder), fcntl.LOCK_SH):
        return generate_latest(registry)


@contextlib.contextmanager
def _files(folder: Path, how: int) -> Iterator[None]:
    """Hold the folder's files as they are: a scrape would miss what is added up meanwhile, or find
    it twice, and fails if one is gone that it has listed."""
    with (folder / "lock").open("ab") as lock:
        fcntl.flock(lock, how)
        yield


def _add(file: Path, total: Path) -> None:
    """Add one file of prometheus_client's to another one."""
    files: Any = MmapedDict  # which has no types
    counted = files(str(total))
    try:
        for key, value, when, _ in files.read_all_values_from_file(str(file)):
            counted.write_value(key, counted.read_value(key)[0] + value, when)
    finally:
        counted.close()


class ProcessMetrics:
    """What an API server has open and has done; written now and then, not for each request."""

    def __init__(self) -> None:
        self._open = Gauge(*OPEN_REQUESTS, multiprocess_mode="livesum")
        self._dispatches = Counter(*DISPATCHES, ["instance"])
        self._dropped = Counter(*DROPPED_OUTPUTS, ["reason"])
        self._told = Counts()

    async def publish(self, counts: Callable[[], Counts]) -> None:
        """Write them again and again."""
        while True:
            self.write(counts())
            await asyncio.sleep(EVERY)

    def write(self, now: Counts) -> None:
        """Write what has come since the last time."""
        told, self._told = self._told, now
        self._open.set(now.open_requests)
        for counter, new, old in (
            (self._dispatches, now.dispatched, told.dispatched),
            (self._dropped, now.dropped, told.dropped),
        ):
            for label, value in new.items():
                if more := value - old.get(label, 0):
                    counter.labels(label).inc(more)
