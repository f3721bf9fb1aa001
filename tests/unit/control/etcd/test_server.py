"""The etcd that a node starts for itself."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llumnix.config import Config, ConfigError
from llumnix.control.etcd import server
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EmbeddedEtcdError, EtcdError
from llumnix.control.etcd.server import CLIENT, EmbeddedEtcd, find_etcd, socket_folder
from tests.kit.wait import eventually


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    server = EmbeddedEtcd(tmp_path / "etcd")
    server.start()
    etcd = Etcd(server.endpoints)
    etcd.put("/a", b"1")
    etcd.close()
    pid = server.pid
    assert pid is not None
    server.stop()
    assert _gone(pid) and server.endpoints == () and server.pid is None
    server.start()
    etcd = Etcd(server.endpoints)
    found = etcd.get("/a")
    assert found is not None and found.value == b"1"
    etcd.close()
    server.stop()
    server.stop()


def test_one_that_ends_alone_is_started_again(tmp_path: Path) -> None:
    server = EmbeddedEtcd(tmp_path)
    server.start()
    etcd = Etcd(server.endpoints)
    try:
        etcd.put("/a", b"1")
        for _ in range(2):
            pid = server.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: server.pid not in (pid, None))
            eventually(lambda: _answers(etcd))
    finally:
        etcd.close()
        server.stop()
    assert server.pid is None and _gone(pid)


def _answers(etcd: Etcd) -> bool:
    try:
        found = etcd.get("/a")
    except EtcdError:
        return False
    return found is not None and found.value == b"1"


def test_a_second_on_the_same_data_is_refused(tmp_path: Path) -> None:
    server = EmbeddedEtcd(tmp_path)
    server.start()
    with pytest.raises(EmbeddedEtcdError, match="another etcd is running on the data in"):
        EmbeddedEtcd(tmp_path).start()
    assert server.pid is not None and not _gone(server.pid)
    server.stop()


def test_dies_with_its_process_even_by_kill(tmp_path: Path) -> None:
    script = (
        "import sys, time, threading\n"
        "from llumnix.control.etcd.server import EmbeddedEtcd\n"
        "server = EmbeddedEtcd(sys.argv[1])\n"
        # The thread that starts it ends at once; etcd must not end with it.
        "t = threading.Thread(target=server.start); t.start(); t.join()\n"
        "time.sleep(0.3)\n"
        "print(server.pid, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        assert not _gone(pid)
        os.kill(node.pid, signal.SIGKILL)
        eventually(lambda: _gone(pid), within=10)
    server = EmbeddedEtcd(tmp_path)
    server.start()
    server.stop()


def test_says_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "etcd"
    broken.write_text("#!/bin/sh\necho no room on the disk >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(EmbeddedEtcdError, match="failed to start: no room on the disk"):
        EmbeddedEtcd(tmp_path / "data", binary=str(broken)).start()
    with pytest.raises(EmbeddedEtcdError, match="No such file"):
        EmbeddedEtcd(tmp_path / "data", binary=str(tmp_path / "none")).start()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(server, "_carried_etcd", lambda: None)
    with pytest.raises(EmbeddedEtcdError, match="there is no etcd to start"):
        EmbeddedEtcd(tmp_path / "data").start()


# ---- who gets in ----

NOBODY = 65534

# Run as another user: what a connection to each of the sockets comes to, and what can be read.
INTRUDE = """
import os, socket, sys
uid = int(sys.argv[1])
os.setgroups([]), os.setgid(uid), os.setuid(uid)
for path in sys.argv[2:]:
    try:
        if path.endswith("log"):
            open(path).read()
        else:
            socket.socket(socket.AF_UNIX).connect(path)
        print("in")
    except OSError as error:
        print(type(error).__name__)
"""


def _listening(pid: int) -> list[str]:
    """The TCP ports on which a process listens."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(fd))
    lines = [line.split() for family in ("tcp", "tcp6")
             for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]]  # fmt: skip
    return [line[1] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("long", [False, True], ids=["", "long path"])
def test_no_other_user_gets_in(tmp_path: Path, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as runtime:
        os.chmod(runtime, 0o777)
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        # Beside one that everybody may enter, so that it is the folder itself that is closed.
        data = Path(runtime) / ("x" * 120 if long else "data")
        data.mkdir(mode=0o755)  # as an earlier version has left it
        server = EmbeddedEtcd(data)
        server.start()
        try:
            assert server.pid is not None and _listening(server.pid) == []
            sockets = Path(server.endpoints[0].removeprefix("unix://")).parent
            assert (sockets == data) is not long
            doors = [str(sockets / name) for name in ("client:0", "peer:0")]
            assert all(Path(door).is_socket() for door in doors)
            command = [sys.executable, "-S", "-c", INTRUDE, str(NOBODY), *doors]
            command.append(str(data / "etcd.log"))
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert said.split() == ["PermissionError"] * 3
            etcdctl = str(Path(find_etcd()).parent / "etcdctl")
            command = [etcdctl, "--endpoints", server.endpoints[0], "put", "/a", "1"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            assert said == "OK\n"
        finally:
            server.stop()


def test_somebody_else_cannot_keep_a_node_from_starting_by_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long path of the data: its sockets lie in a folder whose name others can reckon."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    data = tmp_path / ("long" * 25)
    first = socket_folder(data, CLIENT)
    first.rmdir()
    first.touch()  # as good as somebody's
    second = socket_folder(data, CLIENT)
    assert second.name == f"{first.name}-1"
    first.unlink()
    assert socket_folder(data, CLIENT) == second, "where the socket of one that runs lies"


def test_its_socket_is_an_endpoint_for_other_nodes() -> None:
    config = Config(etcd_endpoints=["unix:///home/u/.local/state/llumnix/etcd/default/client:0"])
    assert config.resolved("127.0.0.1", 1).etcd_endpoints == config.etcd_endpoints
    with pytest.raises(ConfigError, match="unix:///path"):
        Config(etcd_endpoints=["unix://client"]).resolved("127.0.0.1", 1)
