"""A cluster of real etcd members, to be killed, frozen and restarted."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError
from llumnix.control.etcd.server import die_with_parent, find_etcd
from tests.kit.wait import eventually

USER = "root"  # whom etcd wants a password of, if of anyone


class EtcdCluster:
    """`n` members on free loopback ports; a context manager that ends and removes all of them.

    With a password, they want it of the user `USER`, and forget a token that is not used.
    """

    def __init__(self, n: int = 1, password: str = "") -> None:
        ports = free_ports(2 * n)
        self.endpoints = [f"127.0.0.1:{port}" for port in ports[:n]]
        self._peers = [f"http://127.0.0.1:{port}" for port in ports[n:]]
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * n
        self._frozen: set[int] = set()
        self._password = password
        self._dir = Path()

    def __enter__(self) -> "EtcdCluster":
        self._dir = Path(tempfile.mkdtemp(prefix="etcd-"))
        try:
            for i in range(len(self.endpoints)):
                self._launch(i)
            self.wait_ready()
            self._lock()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for i in range(len(self.endpoints)):
            self.kill(i)
        shutil.rmtree(self._dir, ignore_errors=True)

    def kill(self, i: int) -> None:
        """As kill -9 does."""
        process, self._processes[i] = self._processes[i], None
        self._frozen.discard(i)
        if process is not None:
            process.kill()
            process.wait()

    def freeze(self, i: int) -> None:
        """Stops it without a word to anyone: connections stay open, nothing answers."""
        self._signal(i, signal.SIGSTOP)
        self._frozen.add(i)
        process = self._processes[i]
        assert process is not None
        # A thread that runs on another core goes on until it sees the signal.
        eventually(lambda: _stopped(process.pid))

    def thaw(self, i: int) -> None:
        self._frozen.discard(i)
        self._signal(i, signal.SIGCONT)

    def restart(self, i: int, *, wipe: bool = False) -> None:
        """Kills the member if it runs and starts it again; `wipe` makes it forget everything."""
        self.kill(i)
        if wipe:
            shutil.rmtree(self._dir / str(i))
        self._launch(i)

    def restart_all(self, *, wipe: bool = False) -> None:
        """Kills all members before the first starts again, and waits until they serve."""
        for i in range(len(self.endpoints)):
            self.kill(i)
        for i in range(len(self.endpoints)):
            self.restart(i, wipe=wipe)
        self.wait_ready()

    def heal(self) -> None:
        """Brings every member back and waits until each serves."""
        for i in range(len(self.endpoints)):
            if i in self._frozen:
                self.thaw(i)
            if self._processes[i] is None:
                self._launch(i)
        self.wait_ready()
        self._lock()

    def expire_tokens(self) -> None:
        """No member knows a token any more that it has given."""
        self.ctl("auth", "disable")
        self.ctl("auth", "enable")

    def wait_ready(self, within: float = 20.0) -> None:
        """Waits until each member that runs answers with a quorum behind it."""
        for i, endpoint in enumerate(self.endpoints):
            if self._processes[i] is not None and i not in self._frozen:
                eventually(partial(self._answers, endpoint), within)

    def leader(self) -> int:
        """Which member leads the others."""
        for i, endpoint in enumerate(self.endpoints):
            table = self.ctl("endpoint", "status", "--write-out=simple", endpoints=[endpoint])
            if table.split(", ")[4] == "true":
                return i
        raise AssertionError("no member leads")

    def ctl(self, *args: str, endpoints: Sequence[str] | None = None) -> str:
        """What an operator's etcdctl says."""
        binary = str(Path(find_etcd()).parent / "etcdctl")
        command = [binary, "--endpoints", ",".join(endpoints or self.endpoints), *args]
        command += ["--user", f"{USER}:{self._password}"] if self._password else []
        env = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _lock(self) -> None:
        """Want the password, if there is one; members that were wiped have forgotten it."""
        if not self._password or "Authentication Status: true" in self.ctl("auth", "status"):
            return
        self.ctl("user", "add", f"{USER}:{self._password}")
        self.ctl("user", "grant-role", USER, "root")
        self.ctl("auth", "enable")

    def _answers(self, endpoint: str) -> bool:
        etcd = Etcd(
            [endpoint],
            user=USER if self._password else None,
            password=self._password,
            call_timeout=0.5,
        )
        try:
            etcd.get("/")
            return True
        except EtcdError:
            return False
        finally:
            etcd.close()

    def _launch(self, i: int) -> None:
        client, peer = f"http://{self.endpoints[i]}", self._peers[i]
        initial = ",".join(f"m{j}={url}" for j, url in enumerate(self._peers))
        command = [
            find_etcd(),
            f"--name=m{i}",
            f"--data-dir={self._dir / str(i)}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster={initial}",
            "--unsafe-no-fsync",
            "--bcrypt-cost=4",
            "--auth-token-ttl=5",
        ]
        with open(self._dir / f"{i}.log", "ab") as log:
            self._processes[i] = subprocess.Popen(die_with_parent(command), stdout=log, stderr=log)

    def _signal(self, i: int, number: signal.Signals) -> None:
        process = self._processes[i]
        assert process is not None, f"member {i} does not run"
        process.send_signal(number)


def _stopped(pid: int) -> bool:
    """Whether each thread of the process stands still."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on at present."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()
