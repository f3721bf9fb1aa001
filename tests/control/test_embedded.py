"""The etcd that a node starts for itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llumnix.control import embedded
from llumnix.control.embedded import EmbeddedEtcd
from llumnix.control.errors import EmbeddedEtcdError, EtcdError
from llumnix.control.etcd import Etcd
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
        "from llumnix.control.embedded import EmbeddedEtcd\n"
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
    monkeypatch.setattr(embedded, "_carried_etcd", lambda: None)
    with pytest.raises(EmbeddedEtcdError, match="there is no etcd to start"):
        EmbeddedEtcd(tmp_path / "data").start()
