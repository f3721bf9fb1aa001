"""A vLLM engine's process and its outputs, where no engine is needed to see what happens."""

import asyncio
import os
import stat
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState

from llumnix.engine.base import Death, EngineError, EngineEvents
from llumnix.engine.vllm import compat
from llumnix.engine.vllm import instance as module
from llumnix.engine.vllm.instance import VllmEngine
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes.launcher import (
    EngineProcess,
    Placement,
    last_error,
    open_log,
    rotate,
)
from llumnix.engine.vllm.processes.socket_folder import scratch
from llumnix.engine.vllm.processes.watchdog import Patience
from tests.kit.loop import on_loop, soon
from tests.kit.requests import core_request


@pytest.fixture(autouse=True, scope="module")
def folder_of_sockets() -> None:
    """Kept until this process ends, so it is no descriptor that a test has left."""
    scratch()


def engine(tmp_path: Path) -> VllmEngine:
    config: Any = Namespace(parallel_config=Namespace(world_size=1))
    nowhere = Rendezvous("", {}, "")
    return VllmEngine("a-0", config, Placement(), tmp_path / "a-0.log", Patience(5.0), nowhere)


def ignore(_: object) -> None:
    pass


def test_outputs_that_cannot_be_handled_are_a_death_told_once(tmp_path: Path) -> None:
    def fail(step: EngineCoreOutputs) -> None:
        raise KeyError("r1")

    died: list[Death] = []
    vllm = engine(tmp_path)
    vllm._events = EngineEvents(fail, died.append)
    vllm._on_outputs(EngineCoreOutputs())
    vllm._on_outputs(EngineCoreOutputs())
    why = "instance a-0 died: its outputs could not be handled: KeyError: 'r1'"
    assert died == [Death(why)]


@on_loop
async def test_a_request_that_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    class Client:
        async def add_request_async(self, request: Any) -> None:
            raise OverflowError("Integer value out of range")

    vllm = engine(tmp_path)
    vllm._client = Client()  # type: ignore[assignment]
    with pytest.raises(EngineError, match="can't be sent to an engine: Integer value"):
        await vllm.add(core_request("r1", [1]))


@pytest.mark.parametrize(("state", "told"), [("RUNNING", [["r1"]]), ("REQUESTED", [])])
def test_who_ends_a_core_by_a_signal_ends_no_request(
    monkeypatch: pytest.MonkeyPatch, state: str, told: list[list[str]]
) -> None:
    """What is open is resumed elsewhere. (`make chaos` does it to real processes.)"""
    sent: list[list[str]] = []
    monkeypatch.setattr(
        EngineCoreProc, "_send_abort_outputs_to_client", lambda core, ids, client: sent.append(ids)
    )
    compat.lose_no_request_at_shutdown()
    compat.lose_no_request_at_shutdown()  # as a second plug-in might
    core: Any = Namespace(shutdown_state=EngineShutdownState[state])
    EngineCoreProc._send_abort_outputs_to_client(core, ["r1"], 0)
    assert sent == told


class Child:
    """A process that ends when it is asked to."""

    pid = 2**22 + 1  # beyond the largest: there is none

    def __init__(self) -> None:
        self.running, self.closed = True, False

    def is_alive(self) -> bool:
        assert not self.closed
        return self.running

    def terminate(self) -> None:
        self.running = False

    def join(self, timeout: float | None = None) -> None:
        threading.Event().wait(0.02)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def test_two_stops_at_once(tmp_path: Path) -> None:
    process, child = EngineProcess("a-0", tmp_path / "a-0.log"), Child()
    process._process = child  # type: ignore[assignment]
    failed: list[BaseException] = []

    def stop() -> None:
        try:
            process.stop(1.0)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert child.closed and not failed
    process.start(Placement())
    assert process.pid is None, "it is not started after a stop"


@pytest.mark.parametrize("while_", ["forking", "greeting"])
def test_a_stop_ends_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_: str) -> None:
    """Nothing waits for the start's timeout, and nothing runs on."""
    go, forking = threading.Event(), threading.Event()

    @on_loop
    async def check() -> None:
        vllm = engine(tmp_path)
        monkeypatch.setattr(vllm, "_process", Slow(go, forking))
        monkeypatch.setattr(module.Executor, "get_class", ignore)
        start = asyncio.create_task(vllm.start(EngineEvents(ignore, ignore)))
        await soon(forking.is_set)
        if while_ == "greeting":
            go.set()
            await soon(lambda: vllm._ended is not None)
        stop = asyncio.create_task(vllm.stop(0.0))
        await asyncio.sleep(0)
        go.set()
        await stop
        with pytest.raises(EngineError, match="a-0 was stopped while it started"):
            await asyncio.wait_for(start, 2.0)

    check()


class Slow:
    """A process whose fork takes as long as the test wants, and which says nothing."""

    log_file, alive = Path("a-0.log"), True

    def __init__(self, go: threading.Event, forking: threading.Event) -> None:
        self._go, self._forking = go, forking
        self._pipe: Any = None
        self._lock = threading.Lock()

    def start(self, *args: Any, **kwargs: Any) -> None:
        from multiprocessing import Pipe

        with self._lock:
            self._forking.set()
            self._go.wait(5.0)
            self._pipe = Pipe()

    @property
    def sentinel(self) -> int:
        descriptor: int = self._pipe[0].fileno()
        return descriptor

    def stop(self, timeout: float) -> None:
        with self._lock:
            for end in self._pipe or ():
                end.close()


def test_a_start_begins_a_new_log_and_keeps_the_last(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a-0.log"
    rotate(log)
    for text in ("first", "second"):
        log.write_text(text)
        rotate(log)
    assert not log.exists()
    assert log.with_name("a-0.log.1").read_text() == "second"


def test_a_log_is_for_its_user_alone(tmp_path: Path) -> None:
    """Also where an earlier version has made its folder, and whatever the umask is."""
    log = tmp_path / "state" / "logs" / "a-0.log"
    former = os.umask(0)
    try:
        rotate(log)
        os.close(open_log(str(log)))
        modes = [
            stat.S_IMODE(path.stat().st_mode) for path in (log, log.parent, tmp_path / "state")
        ]
        assert modes == [0o600, 0o700, 0o700]
        log.parent.chmod(0o755)
        rotate(log)
        assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    finally:
        os.umask(former)


@pytest.mark.parametrize(
    "fill, found", [(0, "OSError: early"), (70_000, None)], ids=["short", "long"]
)
def test_only_the_tail_of_a_log_is_searched(tmp_path: Path, fill: int, found: str | None) -> None:
    log = tmp_path / "a-0.log"
    log.write_text("OSError: early\n" + "x" * fill + "\n")
    assert last_error(log) == found
