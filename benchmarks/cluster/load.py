"""Open-loop load from several client processes."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from benchmarks.cluster.workload import Planned

ROOT = Path(__file__).parent.parent.parent
_PREPARE_SECONDS = 60.0  # within which a client must have made its requests
_LEAD = 0.2  # seconds from the last client's being ready to the first request


class ClientError(Exception):
    """A client process ended, or said nothing in time."""


class Row(NamedTuple):
    """What came of one request; seconds from when it was to be sent."""

    number: int
    late: float  # its client sent it so much later than planned
    first: float  # 0: no token came
    last: float
    gap: float  # the longest between two of its chunks
    events: int  # chunks with text, of one or more tokens each
    error: str  # empty if it went well; "unfinished" if its time was over

    @property
    def ok(self) -> bool:
        """Whether all of its tokens came."""
        return not self.error


class Clients:
    """The client processes, from start to end of a `with` block; they serve run after run."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Clients":
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        for _ in range(self._number):
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.cluster.client"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
                )
            )  # fmt: skip
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def offer(
        self, url: str, model: str, requests: Sequence[Planned], seed: int, until: float
    ) -> list[Row]:
        """Send the requests, each at its time, and drop what is open after `until` seconds.

        Raises:
            ClientError: a client process failed.
        """
        kill = [process.kill for process in self._processes]
        timer = threading.Timer(_PREPARE_SECONDS + until + 30.0, lambda: [one() for one in kill])
        timer.daemon = True
        timer.start()
        try:
            for place, process in enumerate(self._processes):
                mine = [
                    (n, one.at, one.prompt, one.output)
                    for n, one in enumerate(requests)
                    if n % self._number == place
                ]
                plan = {"url": f"{url}/v1/completions", "model": model, "seed": seed}
                _tell(process, json.dumps(plan | {"until": until, "requests": mine}))
            for process in self._processes:
                _hear(process)
            start = time.monotonic() + _LEAD
            for process in self._processes:
                _tell(process, repr(start))
            found = [Row(*row) for p in self._processes for row in json.loads(_hear(p))]
        finally:
            timer.cancel()
        return sorted(found)


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    assert process.stdin
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError as error:
        raise ClientError("a client process has ended") from error


def _hear(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise ClientError("a client process has ended, or was not done in time")
    return line
