"""Servers under test: started the same way, measured the same way, ended by their process id."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

import psutil

START_SECONDS = 300.0


def model_folder() -> str:
    """The small model's checkpoint (`make model` makes it)."""
    given = os.environ.get("LLUMNIX_TEST_MODEL")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(given) if given else cache / "llumnix/models/SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        sys.exit(f"there is no model at {folder}; run `make model` first")
    return str(folder)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server process and its children, from start to end of a `with` block."""

    def __init__(self, name: str, module: str, *arguments: str, **environment: str) -> None:
        self.name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.started_in = 0.0
        self.state = tempfile.mkdtemp(prefix="llumnix-bench-")
        self._command = [
            sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port),
            "--served-model-name", "smol", *arguments,
        ]  # fmt: skip
        self._environment = {
            **os.environ,
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_STATE_HOME": self.state,
            **environment,
        }
        self.log = Path(self.state) / f"{name}.log"

    def __enter__(self) -> "Server":
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )
        while not self._answers():
            if self._process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                self.__exit__(None, None, None)
                raise RuntimeError(f"{self.name} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)
        self.started_in = time.perf_counter() - began
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        everyone = self._family()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(everyone, timeout=20)
        for process in left:
            process.kill()

    @property
    def process(self) -> psutil.Process:
        """The server's own process, without engines, fork server and etcd."""
        return psutil.Process(self._process.pid)

    def cpu_seconds(self) -> float:
        """CPU time that the server's own process has used."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def whole_cpu_seconds(self) -> float:
        """Likewise of all processes of a server that has several, but its engines and etcd."""
        total = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = " ".join(process.cmdline()[:1])
                if not any(word in title for word in ("EngineCore", "Worker", "etcd")):
                    times = process.cpu_times()
                    total += float(times.user + times.system)
        return total

    def _family(self) -> list[psutil.Process]:
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
