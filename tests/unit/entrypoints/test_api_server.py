"""Signals that a node's process receives, and those that it does not count."""

import argparse
import asyncio
import os
import signal
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
