"""Node processes. They are forked from one that has imported vLLM, and so start in a second."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from tests.kit.etcd import free_ports
from tests.kit.wait import eventually

HOST = "127.0.0.1"


def forkserver() -> ForkServerContext:
    """The process that nodes are forked from; it imports vLLM while the caller goes on."""
    from multiprocessing import forkserver as server

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["llumnix.node.runtime", "llumnix.engine.vllm.arguments", "tests.kit.node"]
    )
    server.ensure_running()
    return context


def _run(argv: list[str], log: str, environment: dict[str, str]) -> None:
    """The main function of a node process."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.environ.update(environment)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from llumnix.entrypoints.vllm import api_server

    code = api_server.main(argv)
    sys.stdout.flush()
    sys.exit(code)


@dataclass(frozen=True)
class Answer:
    """An HTTP response, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def error(self) -> dict[str, Any]:
        """The error in it, which has the shape that OpenAI's clients expect."""
        error: dict[str, Any] = self.json["error"]
        assert isinstance(error["message"], str) and error["message"]
        assert isinstance(error["type"], str) and {"param", "code"} <= error.keys()
        return error


class Events:
    """A stream of server-sent events under way."""

    def __init__(self, response: HTTPResponse) -> None:
        self.response = response
        self.done = False  # after [DONE]

    def __iter__(self) -> Iterator[Any]:
        for line in self.response:
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                self.done = True
                return
            yield json.loads(data)

    def text(self) -> str:
        """The rest of the text, for one choice."""
        return "".join(event["choices"][0].get("text") or "" for event in self if event["choices"])


@dataclass
class Node:
    """A node process under test."""

    name: str
    port: int
    log: Path
    process: Any
    started: float = field(default_factory=time.monotonic)
    took: float = 0.0  # seconds until it was seen to answer requests for the first time

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        pid: int = self.process.pid
        return pid

    @property
    def said(self) -> str:
        """Everything it has logged."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    # ---- its life ----

    def ready(self, within: float = 60.0) -> "Node":
        """Wait until it answers requests."""
        try:
            eventually(lambda: self._ended() or self.answers("/readyz"), within, every=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.said[-3000:]}") from None
        assert not self._ended(), f"it ended:\n{self.said[-3000:]}"
        self.took = self.took or time.monotonic() - self.started
        return self

    def up(self, within: float = 60.0) -> "Node":
        """Wait until it answers at all."""
        eventually(lambda: self._ended() or self.answers("/livez"), within, every=0.05)
        assert not self._ended(), f"it ended:\n{self.said[-3000:]}"
        return self

    def answers(self, path: str) -> bool:
        with contextlib.suppress(OSError, HTTPException):
            return self.get(path, within=5.0).status == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, within: float = 20.0) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.exit_code(within)

    def exit_code(self, within: float = 20.0) -> int:
        """The status with which it ends by itself; less than 0: the signal that killed it."""
        self.process.join(within)
        assert self._ended(), f"it still runs after {within} s:\n{self.said[-3000:]}"
        code: int = self.process.exitcode
        return code

    def kill(self) -> None:
        """SIGKILL; nothing happens if it has ended."""
        if not self._ended():
            self.process.kill()
            self.process.join(10.0)

    def _ended(self) -> bool:
        return self.process.exitcode is not None

    # ---- requests ----

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        within: float = 30.0,
    ) -> Answer:
        """One request; a body that is no bytes is sent as JSON."""
        began = time.monotonic()
        connection = HTTPConnection(HOST, self.port, timeout=within)
        try:
            response = _send(connection, method, path, body, headers)
            return Answer(
                response.status, dict(response.headers), response.read(), time.monotonic() - began
            )
        finally:
            connection.close()

    def get(self, path: str, within: float = 30.0) -> Answer:
        return self.request("GET", path, within=within)

    def post(self, path: str, body: Any, **kwargs: Any) -> Answer:
        return self.request("POST", path, body, **kwargs)

    @contextlib.contextmanager
    def stream(self, path: str, body: Any, within: float = 30.0) -> Iterator[Events]:
        """A streamed answer; leaving the context hangs up."""
        connection = HTTPConnection(HOST, self.port, timeout=within)
        try:
            response = _send(connection, "POST", path, body | {"stream": True}, None)
            assert response.status == 200, response.read()
            yield Events(response)
        finally:
            connection.close()
            with contextlib.suppress(UnboundLocalError):
                response.close()

    # ---- what it shows ----

    @property
    def status(self) -> Any:
        return self.get("/status").json

    def instances(self, state: str = "ready") -> list[str]:
        """The instances that it sees in that state."""
        return [i["id"] for i in self.status["instances"] if i["state"] == state]

    def metrics(self) -> dict[str, float]:
        """Each sample by its name and labels, as written."""
        samples = {}
        for line in self.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    def metric(self, name: str) -> float:
        """The sum of a metric over all its labels."""
        return sum(v for k, v in self.metrics().items() if k.partition("{")[0] == name)

    def idle(self) -> bool:
        """Whether nothing of any request is left on this node."""
        names = ("running", "waiting", "used_blocks")
        metrics = self.metrics()
        return not any(
            value
            for key, value in metrics.items()
            if key == "llumnix_open_requests"
            or key.startswith(tuple(f"llumnix_instance_{name}{{" for name in names))
        )

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))


def _send(
    connection: HTTPConnection,
    method: str,
    path: str,
    body: Any,
    headers: Mapping[str, str] | None,
) -> HTTPResponse:
    sent = {"Content-Type": "application/json"} if body is not None else {}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    connection.request(method, path, body, sent | dict(headers or {}))
    return connection.getresponse()


def llumnixctl(*argv: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, and what it has said."""
    command = [sys.executable, "-m", "llumnix.entrypoints.ctl", *argv]
    root = str(Path(__file__).parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(command, capture_output=True, text=True, timeout=90, env=env)


def descendants(pid: int) -> set[int]:
    """The processes that this one has started, and those that they have started."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(int(name))
    found: set[int] = set()
    left = [pid]
    while left:
        for child in children.get(left.pop(), ()):
            found.add(child)
            left.append(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those of the processes that still run."""
    return {pid for pid in pids if Path(f"/proc/{pid}").exists() and _state(pid) not in "ZX"}


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "X"


class Nodes:
    """Starts nodes, and sees that each ends with the test."""

    def __init__(self, folder: Path, endpoints: Sequence[str], cluster: str, model: str) -> None:
        self.folder = folder
        self.endpoints = list(endpoints)
        self.cluster = cluster
        self.model = model
        self._context = forkserver()
        self._nodes: list[Node] = []

    def start(
        self,
        name: str,
        *options: str,
        engine: str = "sim",
        endpoints: Sequence[str] | None = None,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Node:
        """Start a node and return at once; options are those of its command line."""
        port = port or free_ports(1)[0]
        where = self.endpoints if endpoints is None else list(endpoints)
        argv = ["--host", HOST, "--port", str(port), "--model", self.model, "--node", name]
        argv += ["--cluster", self.cluster, "--state-dir", str(self.folder / name)]
        argv += ["--engine", engine, "--served-model-name", "small"]
        argv += ["--etcd-endpoints", *where] if where else []
        if engine == "sim":
            argv += ["--sim-profile", "cpu-smoke", "--max-model-len", "2048"]
        log = self.folder / f"{name}.log"
        process = self._context.Process(
            target=_run, args=([*argv, *options], str(log), dict(environment or {})), name=name
        )
        process.start()
        node = Node(name, port, log, process)
        self._nodes.append(node)
        return node

    def close(self) -> None:
        """End all that still run, and everything that they have started."""
        left = set().union(*(descendants(node.pid) for node in self._nodes))
        for node in self._nodes:
            node.kill()
        eventually(lambda: not alive(left), within=10)
