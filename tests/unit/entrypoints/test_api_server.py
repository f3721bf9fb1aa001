"""Signals that a node's process receives, and those that it does not count."""

import argparse
import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llumnix.config import Config
from llumnix.entrypoints.vllm import api_server
from llumnix.node import runtime as node_module
from tests.kit.loop import on_loop


class GivingUp:
    """A node that gives up as soon as it has started, and receives signals while it stops."""

    signals = 1

    def __init__(self, *args: Any) -> None:
        self._on_giving_up = args[-1]

    async def start(self) -> None:
        self._on_giving_up("the control loop stands still")

    async def stop(self) -> None:
        for _ in range(self.signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)  # the loop calls the handler


@pytest.mark.parametrize(("signals", "exits"), [(1, []), (2, [128 + signal.SIGTERM])])
def test_only_a_second_signal_ends_at_once_a_node_that_has_given_up(
    monkeypatch: pytest.MonkeyPatch, signals: int, exits: list[int]
) -> None:
    exited: list[int] = []
    monkeypatch.setattr(os, "_exit", exited.append)
    monkeypatch.setattr(node_module, "Node", GivingUp)
    monkeypatch.setattr(GivingUp, "signals", signals)

    @on_loop
    async def serve() -> None:
        engines: Any = None
        assert await api_server._serve(Config(), argparse.Namespace(), engines) == 1

    serve()
    assert exited == exits


@pytest.mark.parametrize(
    ("words", "several"),
    [
        ("", False),
        ("--api-server-count 1", False),
        ("--api-server-count 4", True),
        ("--api-server-count=4 --model m", True),
        ("-asc 2", True),
        ("--config FILE", True),
        ("--config FILE --api-server-count 1", False),
        ("--config no.yaml", False),
    ],
)
def test_whether_several_api_servers_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, several: bool
) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("model: m\napi-server-count: 2\n")
    monkeypatch.delenv("LLUMNIX_API_SERVER_COUNT", raising=False)
    argv = words.replace("FILE", str(file)).split()
    assert api_server._several(argv) is several
    monkeypatch.setenv("LLUMNIX_API_SERVER_COUNT", "3")
    assert api_server._several(argv) is (several or "count 1" not in words)
