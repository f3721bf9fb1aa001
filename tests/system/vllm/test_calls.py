"""Utility calls to an engine whose process ends."""

import asyncio
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llumnix.engine.base import EngineDead
from llumnix.engine.vllm.instance import VllmEngine
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes.launcher import Placement
from llumnix.engine.vllm.processes.watchdog import Patience
from tests.kit.loop import on_loop


class Client:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def call_utility_async(self, method: str, *args: Any) -> Any:
        self.asked.set()
        return await self.answer


def _engine(tmp_path: Path) -> tuple[VllmEngine, Client]:
    config: Any = Namespace(parallel_config=Namespace(world_size=1))
    log, nowhere = tmp_path / "a-0.log", Rendezvous("", {}, "")
    engine, client = VllmEngine("a-0", config, Placement(), log, Patience(5.0), nowhere), Client()
    engine._client = client  # type: ignore[assignment]
    engine._ended = asyncio.get_running_loop().create_future()
    return engine, client


@on_loop
async def test_a_call_to_an_engine_that_dies_ends_at_once(tmp_path: Path) -> None:
    engine, client = _engine(tmp_path)
    call = asyncio.create_task(engine.call("get_supported_tasks"))
    await client.asked.wait()
    assert engine._ended is not None
    engine._ended.set_result(None)
    with pytest.raises(EngineDead, match="instance a-0 is dead"):
        await asyncio.wait_for(call, 2.0)
    assert client.answer.cancelled(), "nobody waits for it any more"


@on_loop
async def test_a_call_that_is_answered(tmp_path: Path) -> None:
    engine, client = _engine(tmp_path)
    client.answer.set_result(("generate",))
    assert await engine.call("get_supported_tasks") == ("generate",)
