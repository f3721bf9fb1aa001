"""The cluster under test: three etcd members, nodes behind proxies, and what is known of them."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from datetime import datetime
from http.client import HTTPException
from pathlib import Path

from tests.chaos.orders import FOLDER
from tests.kit.etcd import USER, EtcdCluster, free_ports
from tests.kit.node import Node, Nodes, alive, descendants
from tests.kit.proxy import Proxies, holder

NAMES = ("a", "b", "c")
CLUSTER = "chaos"
PREFIX = f"/llumnix/{CLUSTER}/"
START = 240.0  # seconds for the first start, when every node imports vLLM at once
PROFILE = "cpu-steady"
SERVERS = {"c": 2}  # API servers of a node that has several
ETCD = "etcd"  # all its members, for the proxies
PASSWORD = "chaos"
EXECUTOR = "tests.chaos.executor.FaultyExecutor"
ENGINES = {  # vllm: engine cores in processes of their own; sim: engines inside the nodes
    "vllm": ("--distributed-executor-backend", EXECUTOR, "--no-async-scheduling"),
    "sim": ("--sim-profile", PROFILE),
}
OPTIONS = ("--max-model-len", "2048", "--num-gpu-blocks-override", "400", "--block-size", "16")
OPTIONS += ("--disable-uvicorn-access-log", "--migration-interval", "0.3")
# The rescheduler has something to do at this load, too.
OPTIONS += ("--migration-out-below", "100", "--migration-in-above", "100")
ENVIRONMENT = {"LLUMNIX_SIM_PROFILE": PROFILE, "VLLM_CPU_KVCACHE_SPACE": "1"}

_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?:INFO|WARNING|ERROR) (.*)$")


class Arena:
    """Starts everything, and starts again what was killed."""

    def __init__(
        self,
        folder: Path,
        model: str,
        etcd: EtcdCluster,
        proxies: Proxies,
        instances: int,
        engine: str = "vllm",
    ) -> None:
        self.folder = folder
        self.etcd = etcd
        self.proxies = proxies
        self.instances = instances  # of each node
        self.engine = engine
        self.nodes: dict[str, Node] = {}
        self.seen: set[int] = set()  # every process that a node has started
        self._starter = Nodes(folder, etcd.endpoints, CLUSTER, model)
        self._ports = dict(zip(NAMES, free_ports(len(NAMES)), strict=True))
        self._fronts: dict[str, int] = {}
        self._endpoints = {name: self._way_to_etcd(name) for name in NAMES}
        self.orders = folder / "orders"  # for engines; see `FaultyExecutor`
        self.orders.mkdir()
        proxies.owner = self._owner

    def start(self, name: str) -> Node:
        """Start a node, at the address that it has had before."""
        port = self._ports[name]
        if name not in self._fronts:
            self._fronts[name] = self.proxies.front(name, port)
        front = ("--advertise-address", f"127.0.0.1:{self._fronts[name]}")
        count = ("--initial-instances", str(self.instances))
        if name in SERVERS:
            count += ("--api-server-count", str(SERVERS[name]))
        user = ("--etcd-user", USER, "--etcd-password", PASSWORD)
        node = self._starter.start(
            name,
            *(*ENGINES[self.engine], *OPTIONS, *front, *count, *user),
            engine=self.engine,
            endpoints=self._endpoints[name],
            port=port,
            environment=ENVIRONMENT | {FOLDER: str(self.orders)},
        )
        self.nodes[name] = node
        return node

    def urls(self) -> dict[str, str]:
        """Where the nodes' clients find them, whether they run or not."""
        return {name: f"http://127.0.0.1:{port}" for name, port in self._ports.items()}

    def close(self) -> None:
        """End all that is left."""
        self._starter.close()

    # ---- what there is ----

    def leader(self) -> str:
        """The node that leads, as the etcd has it; empty if none does."""
        for node in self.nodes.values():
            with contextlib.suppress(OSError, HTTPException, ValueError, KeyError):
                if leader := node.status["leader"]:
                    return str(leader)
        return ""

    def engines(self, name: str) -> dict[str, int]:
        """The EngineCore process of each instance of a node."""
        found = {}
        for pid in descendants(self.nodes[name].pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"VLLM::EngineCore"):
                    found[f"{name}:{pid}"] = pid
        return found

    def api_servers(self, name: str) -> list[int]:
        """The processes of a node's API servers, where it has several."""
        said = re.findall(r"API server \d+ is process (\d+)", self.nodes[name].said)
        return sorted(alive({int(pid) for pid in said}) & descendants(self.nodes[name].pid))

    def remember(self) -> None:
        """Note all processes that run now, for them to be gone in the end."""
        for node in self.nodes.values():
            if node.process.exitcode is None:
                self.seen |= {node.pid, *descendants(node.pid)}

    def ails(self, name: str) -> str:
        """What a node lacks, or does not see; empty if nothing is amiss."""
        node, wanted = self.nodes[name], len(NAMES) * self.instances
        if node.process.exitcode is not None:
            return f"node {name} has ended ({node.process.exitcode})"
        try:
            if node.get("/readyz").status != 200:
                return f"node {name} is not ready"
            status = node.status
        except (OSError, HTTPException, ValueError) as error:
            return f"node {name} does not answer: {type(error).__name__}"
        ready = [i["id"] for i in status["instances"] if i["state"] == "ready"]
        if len(ready) != wanted or len(status["instances"]) != wanted:
            return f"node {name} sees {sorted(ready)} ready"
        if {n["id"] for n in status["nodes"]} != set(NAMES):
            return f"node {name} sees the nodes {sorted(n['id'] for n in status['nodes'])}"
        if status["leader"] not in NAMES:
            return f"node {name} sees no leader"
        if status["draining"]:
            return f"node {name} sees {status['draining']} draining"
        return ""

    def unwell(self) -> str:
        """What is missing until the cluster is whole; empty if nothing is."""
        return next((ailment for name in self.nodes if (ailment := self.ails(name))), "")

    def whole(self, within: float) -> str:
        """Wait until nothing is missing; what still is, after so many seconds."""
        until = time.monotonic() + within
        while (missing := self.unwell()) and time.monotonic() < until:
            if "has ended" in missing:  # it does not come back by itself
                break
            time.sleep(0.25)
        return missing

    def mend(self) -> None:
        """Bring back by force what did not come back by itself."""
        self.proxies.reset()
        self.etcd.heal()
        for name in ("desired", "drain"):
            with contextlib.suppress(AssertionError):
                self.etcd.ctl("del", "--prefix", f"{PREFIX}{name}/")
        for name, node in list(self.nodes.items()):
            if node.process.exitcode is None:
                node.signal(signal.SIGCONT)
                if node.answers("/readyz") and not self.ails(name):
                    continue
            self.kill(name)
            self.start(name)

    def kill(self, name: str) -> None:
        """SIGKILL of a node and of all that it has started."""
        node = self.nodes[name]
        pids = {node.pid, *descendants(node.pid)} if node.process.exitcode is None else set()
        self.seen |= pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.process.join(10.0)

    def said(self, since: float) -> list[tuple[float, str, str]]:
        """What the nodes have logged since then: when, which node, and the sentence."""
        lines = []
        for name, node in self.nodes.items():
            for line in _tail(node.log):
                if (found := _LINE.match(line)) is None:
                    continue
                when = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                if when >= since:
                    lines.append((when, name, found[2]))
        return sorted(lines)

    def tracebacks(self) -> dict[str, int]:
        """How many each node has logged."""
        return {n: node.said.count("Traceback (most recent") for n, node in self.nodes.items()}

    def left(self) -> set[int]:
        """Processes of nodes that still run."""
        return alive(self.seen)

    def _way_to_etcd(self, name: str) -> list[str]:
        """The endpoints of a node, behind proxies; one of the nodes has a dead one first."""
        ports = [int(endpoint.rpartition(":")[2]) for endpoint in self.etcd.endpoints]
        fronts = [self.proxies.front(ETCD, port, name) for port in ports]
        dead = free_ports(1) if name == NAMES[-1] else []
        return [f"127.0.0.1:{port}" for port in (*dead, *fronts)]

    def _owner(self, port: int) -> str | None:
        pids = {n.pid: name for name, n in self.nodes.items() if n.process.exitcode is None}
        return holder(port, pids)


def _tail(log: Path, size: int = 2 * 2**20) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - size, 0))
        return file.read().decode(errors="replace").splitlines()


def later(predicate: Callable[[], object], within: float) -> bool:
    """Whether it becomes true in time."""
    until = time.monotonic() + within
    while not predicate():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
