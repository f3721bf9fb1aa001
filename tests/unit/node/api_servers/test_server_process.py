"""An API server's process is ended when it hangs, and not before it had time to be heard of."""

import asyncio
import os
from typing import Any

import pytest

from llumnix.node.api_servers import server_process
from llumnix.node.api_servers.server_process import LINKLESS, ServerProcess


class Process:
    """A process that is up, and ends when it is killed; also the context that makes it."""

    pid, exitcode = 4711, -9

    def __init__(self) -> None:
        self.sentinel, self._end = os.pipe()
        self.kills = 0

    def Process(self, **_: Any) -> "Process":
        return self

    def start(self) -> None:
        pass

    def join(self) -> None:
        pass

    def kill(self) -> None:
        self.kills += 1
        os.close(self._end)

    def close(self) -> None:
        os.close(self.sentinel)


def test_a_server_has_time_to_link_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        process = Process()
        monkeypatch.setattr(server_process, "start_fork_server", lambda: process)
        ended = asyncio.Event()
        settings: Any = lambda *_: None  # noqa: E731
        server = ServerProcess(0, settings, lambda *_: ended.set())
        keeping = asyncio.create_task(server.keep())
        while not server.started:
            await asyncio.sleep(0.001)
        up = (
            52_000.0  # seconds since the machine was started, which is what the loop's clock counts
        )
        server.look(up)
        server.look(up + LINKLESS)
        assert process.kills == 0
        server.end()
        server.look(up + LINKLESS + 1.0)
        assert process.kills == 1
        await ended.wait()
        await keeping

    asyncio.run(run())
