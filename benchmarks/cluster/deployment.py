"""A system that is up: where it takes requests, and what it says of itself."""

import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from benchmarks.cluster.process import Process, complaints, end_all
from benchmarks.cluster.scrape import Sample, busy, read
from benchmarks.cluster.systems import Layout

_IDLE_SECONDS = 10.0


class Deployment:
    """Its processes, from start to end of a `with` block."""

    def __init__(self, layout: Layout, start_timeout: float) -> None:
        self._layout = layout
        self._timeout = start_timeout
        self._folder = Path()
        self._processes: list[Process] = []
        self.started_in = 0.0
        self.report: list[str] = []  # what it complained of, after its end

    @property
    def url(self) -> str:
        """Where it takes requests."""
        return self._layout.front.url

    def __enter__(self) -> "Deployment":
        self._folder = Path(tempfile.mkdtemp(prefix="llumnix-cluster-"))
        began = time.monotonic()
        try:
            for group in self._layout.groups:
                started = [Process(part, self._folder) for part in group]
                self._processes += started
                for process in started:
                    process.wait_ready(began + self._timeout)
        except BaseException:
            self._end()
            raise
        self.started_in = time.monotonic() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def scrape(self) -> list[Sample]:
        """The metrics of all its engines."""
        return [sample for samples in self.scrape_each() for sample in samples]

    def scrape_each(self) -> list[list[Sample]]:
        """The same for each of its servers."""
        return [read(p.part.url) for p in self._processes if p.part.measured]

    def wait_idle(self) -> None:
        """Until no engine has a request, or some seconds are over."""
        deadline = time.monotonic() + _IDLE_SECONDS
        while busy(self.scrape()) and time.monotonic() < deadline:
            time.sleep(0.1)

    def cpu_seconds(self) -> float:
        """CPU time of the process that takes requests, without engines."""
        return self._processes[-1].cpu_seconds()

    def _end(self) -> None:
        end_all(self._processes)
        for log in sorted(self._folder.rglob("*.log")):
            self.report += [f"{log.stem}: {line}" for line in complaints(log)]
        shutil.rmtree(self._folder, ignore_errors=True)
