"""Starts EngineCore processes out of a fork server that has already imported vLLM.

Importing vLLM costs seconds of one core; a process forked from one that has done it starts at
once. The fork server touches no device, so its children may.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from llumnix.engine.vllm import plugin
from llumnix.engine.vllm.processes import compiled_code
from llumnix.engine.vllm.processes.parent_death import PARENT, end_with_node
from llumnix.engine.vllm.processes.socket_folder import hold_sockets, scratch

logger = logging.getLogger(__name__)

# What an EngineCore and its worker import; whatever is missing in a version is imported later.
_PRELOAD = [
    "llumnix.engine.vllm.processes.forkserver_first",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "llumnix.engine.vllm.processes.forkserver_preload",
    "llumnix.engine.vllm.kv.migration_utility",
    "llumnix.engine.vllm.kv.transfer",
]

# The thread that starts the fork server: to the kernel it is the parent, so it lives as long as
# this process.
_keeper = ThreadPoolExecutor(1, "fork server")


@dataclass(frozen=True)
class Placement:
    """Which share of the machine an instance gets, as environment and as CPU cores."""

    environment: dict[str, str] = field(default_factory=dict)
    cores: frozenset[int] = frozenset()  # empty: not bound


# What an API server in a process of its own imports besides; some of it in the middle of its start.
_API_SERVER = [
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.anthropic.serving",
    "vllm.entrypoints.openai.responses.serving",
    "vllm.renderers.hf",
    "prometheus_fastapi_instrumentator",
    "model_hosting_container_standards.sagemaker",
    "llumnix.node.api_servers.api_process",
]

_joined = False  # whether this process uses the fork server of its node


def start_fork_server(api_servers: bool = False) -> ForkServerContext:
    """Start the fork server if it is not running, and let it import vLLM meanwhile.

    Call it as early as possible: it imports on another core while the caller goes on.
    `api_servers`: whether API servers are to be forked from it, too.
    """
    context = multiprocessing.get_context("forkserver")
    if not _joined:
        context.set_forkserver_preload([*_PRELOAD, *(_API_SERVER if api_servers else ())])
        compiled_code.place()
        _keeper.submit(_run_fork_server).result()
    return context


def fork_server_address() -> str:
    """Where this node's fork server is reached, for `join_fork_server` in its children."""
    start_fork_server()
    return str(_server()._forkserver_address)


def join_fork_server(address: str) -> None:
    """Have processes of this one, which is a child of a node's fork server, forked from there, too.

    multiprocessing would start a fork server of its own, which imports vLLM once more. What it
    takes to talk to the parent is there already, but for the address.
    """
    global _joined
    _joined = True
    server = _server()
    server._forkserver_address = address
    server.ensure_running = resource_tracker.ensure_running


def _server() -> Any:
    """multiprocessing's own object, of which it keeps one for a process."""
    return forkserver._forkserver


def _run_fork_server() -> None:
    hold_sockets()
    # Whatever PyTorch, vLLM and their compilers put into the temporary folder by a name that can be
    # guessed, and load from there as code, is in a folder that nobody else can have made.
    with _environment({PARENT: str(os.getpid()), "TMPDIR": str(scratch())}):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables, for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- an engine's log: a new one for each start, for the eyes of the node's user alone ----

# An exception's own line at the end of a traceback.
_ERROR_LINE = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception)): (.+)$")
# Exceptions that only say that another one happened elsewhere.
_SECONDARY = ("See stack trace", "See root cause", "initialization failed")

_TAIL = 64 * 1024  # bytes that are searched for why an engine ended


def rotate(log_file: Path) -> None:
    """Make room for a new log, in a folder that is nobody else's; the log before is kept.

    Prompts may be in it, if vLLM is told to log requests.
    """
    folder = log_file.parent
    for missing in reversed([f for f in (folder, *folder.parents) if not f.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)  # that of an earlier version was open to all
    with contextlib.suppress(FileNotFoundError):
        log_file.replace(log_file.with_name(f"{log_file.name}.1"))


def open_log(log_file: str) -> int:
    """A descriptor to write a log to, which its user alone may read."""
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.fchmod(log, 0o600)  # the umask may have taken from it, and must not
    return log


def last_error(log_file: Path) -> str | None:
    """The most telling exception line in the tail of an engine's log."""
    try:
        with log_file.open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - _TAIL, 0))
            lines = log.read().decode(errors="replace").splitlines()[-400:]
    except OSError:
        return None
    found = [m for line in lines if (m := _ERROR_LINE.search(line))]
    primary = [m for m in found if not any(s in m[2] for s in _SECONDARY)]
    if not found:
        return None
    best = (primary or found)[-1]
    return f"{best[1]}: {best[2]}"


# ---- its process ----


class EngineProcess:
    """One EngineCore process, owned by this node: it dies with the node, whatever happens."""

    def __init__(self, name: str, log_file: Path) -> None:
        self.name = name
        self.log_file = log_file
        self._process: ForkServerProcess | None = None
        self._stopped = False
        self._lock = threading.Lock()  # start and stop are called from threads

    def start(self, placement: Placement, **kwargs: Any) -> None:
        """Fork the process. Blocks until the fork server has finished importing.

        After a stop it does nothing.
        """
        with self._lock:
            if self._stopped:
                return
            rotate(self.log_file)
            context = start_fork_server()
            arguments = (str(self.log_file), placement, kwargs)
            process = context.Process(target=_engine_core, args=arguments, name=self.name)
            process.start()
            self._process = process

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and not connection.wait([self.sentinel], 0)

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process ends."""
        assert self._process is not None
        return self._process.sentinel

    @property
    def pid(self) -> int | None:
        """The process id, None before start."""
        return self._process.pid if self._process else None

    def failure(self) -> str:
        """One line that tells why the process ended, from its log if that says anything."""
        code = self._process.exitcode if self._process else None
        status = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit {code}"
        return f"{last_error(self.log_file) or 'the engine process ended'} ({status})"

    def stop(self, timeout: float) -> None:
        """SIGTERM, then SIGKILL after `timeout` seconds; blocks until the process is gone."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._end(self._process, timeout)

    def _end(self, process: ForkServerProcess, timeout: float) -> None:
        if process.is_alive():
            process.terminate()
            process.join(timeout)
        if process.is_alive():
            logger.warning(
                "engine process %s did not end in %.0f s; killing it", self.name, timeout
            )
            process.kill()
            process.join()
        with contextlib.suppress(ProcessLookupError):
            # Its workers are of its process group, and one that is stopped would never end.
            os.killpg(process.pid or 2**31 - 1, signal.SIGKILL)
        self._process = None
        process.close()


def _engine_core(log_file: str, placement: Placement, kwargs: dict[str, Any]) -> None:
    """The main function of an engine process (in the child)."""
    log = open_log(log_file)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.close(log)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # a Ctrl-C at the terminal is the node's business
    end_with_node()

    # Workers are forked from here, where vLLM is imported already. (On a GPU nothing has touched
    # the device yet; vLLM itself falls back to spawn where fork would not be safe.)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    os.environ[plugin.VARIABLE] = multiprocessing.current_process().name
    # The hash of a block must be the same everywhere: it names the block when it moves.
    os.environ.setdefault("PYTHONHASHSEED", "0")
    os.environ.update(placement.environment)
    tempfile.tempdir = None  # which the fork server has read from its own environment
    if placement.cores:
        _bind_workers(placement.cores)

    from vllm.v1.engine.core import EngineCoreProc

    # Workers that are forked have it from here; vLLM loads it itself in those that are spawned.
    plugin.register()
    compiled_code.compile_nothing_if_eager(kwargs["vllm_config"])
    EngineCoreProc.run_engine_core(**kwargs)


def _bind_workers(cores: frozenset[int]) -> None:
    """Bind this engine's workers, not its scheduler, to their cores.

    vLLM does it with OpenMP's environment, which a forked worker has already read.
    """
    import torch

    torch.set_num_threads(len(cores))
    os.register_at_fork(after_in_child=lambda: os.sched_setaffinity(0, cores))
