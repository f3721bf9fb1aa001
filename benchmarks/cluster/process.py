"""One server process with all that it starts: in a session of its own, and ended for certain."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from llumnix.control.etcd.server import die_with_parent

HOST = "127.0.0.1"
_TERM_SECONDS = 20.0
_WORTH_TELLING = re.compile(r"\b(ERROR|CRITICAL|Traceback|\w*Error:)")


class StartError(Exception):
    """A server ended before it was ready, or took too long."""


@dataclass(frozen=True)
class Part:
    """One process of a system: what to run, and how it is known to be ready."""

    name: str
    command: Sequence[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    instances: int = 0  # that /status must show as ready; 0: /health says enough
    measured: bool = True  # it has the engines' metrics

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"


class Process:
    """A part that runs, with its log in a folder."""

    def __init__(self, part: Part, folder: Path) -> None:
        self.part = part
        self.log = folder / f"{part.name}-{part.port}.log"
        environment = {
            **os.environ,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "XDG_STATE_HOME": str(folder),
            **part.environment,
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                die_with_parent(list(part.command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait_ready(self, deadline: float) -> None:
        """Until it serves.

        Raises:
            StartError: it does not, by that time of the monotonic clock.
        """
        while not self._ready():
            ended = self._process.poll()
            if ended is not None:
                raise StartError(f"{self.part.name} ended with {ended}:\n{self.tail(30)}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.part.name} was not ready in time:\n{self.tail(30)}")
            time.sleep(0.1)

    def cpu_seconds(self) -> float:
        """CPU time of the process itself, without its engines; 0 if it is gone."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self._process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def ask_to_end(self) -> list[psutil.Process]:
        """SIGTERM to the process; its family is returned, to be waited for."""
        try:
            leader = psutil.Process(self._process.pid)
            family = [leader, *leader.children(recursive=True)]
        except psutil.Error:
            family = []
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        return family

    def kill_rest(self, family: Sequence[psutil.Process], deadline: float) -> None:
        """Wait for the family until then, and kill what is left of it and of the session."""
        _, left = psutil.wait_procs(family, timeout=max(deadline - time.monotonic(), 0.0))
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        psutil.wait_procs(left, timeout=5)
        self._process.wait(timeout=5)

    def tail(self, lines: int) -> str:
        """The end of what it said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.part.url}/health", timeout=2):
                pass
            if not self.part.instances:
                return True
            with urllib.request.urlopen(f"{self.part.url}/status", timeout=2) as answer:
                states = [one["state"] for one in json.load(answer)["instances"]]
            return states.count("ready") >= self.part.instances
        except (urllib.error.URLError, OSError, ValueError):
            return False


def complaints(log: Path, most: int = 20) -> list[str]:
    """The first lines of a log that tell of an error, and how many more there are."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line[:300] for line in lines if _WORTH_TELLING.search(line)]
    more = [f"… and {len(found) - most} more such lines"] if len(found) > most else []
    return found[:most] + more


def end_all(processes: Sequence[Process]) -> None:
    """End the processes, the last started first, all within the same time."""
    asked = [(process, process.ask_to_end()) for process in reversed(processes)]
    deadline = time.monotonic() + _TERM_SECONDS
    for process, family in asked:
        process.kill_rest(family, deadline)


def free_ports(number: int) -> list[int]:
    """Ports of the loopback that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]
