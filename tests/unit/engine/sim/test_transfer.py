"""KV blocks that leave a modelled device, as its node sees it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.engine.base import EngineError, Transfer
from llumnix.engine.sim.executor import ModelledExecutor
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous, VllmBlocks
from llumnix.engine.vllm.kv.migration_utility import migration as utility
from tests.kit.workers import Holds

LAYERS, PAGE = 3, 512  # bytes of a block in a layer
TRANSFER = Transfer(pair="a-0>b-0", group="g", first=1, count=2, within=5.0)


def _core(holds: Holds) -> Any:
    """As much of an engine core as a migration needs, over a real modelled device."""
    executor = object.__new__(ModelledExecutor)
    spec = SimpleNamespace(page_size_bytes=PAGE)
    group = SimpleNamespace(layer_names=["layer"] * LAYERS, kv_cache_spec=spec)
    configs: Any = [SimpleNamespace(kv_cache_groups=[group])]
    executor.initialize_from_config(configs)
    return SimpleNamespace(scheduler=SimpleNamespace(block_holds=holds), model_executor=executor)


@pytest.mark.parametrize("operation", ["send", "receive"])
def test_a_transfer_ends_at_once(tmp_path: Path, operation: str) -> None:
    """With as many bytes as real blocks have; what has arrived is stored."""
    holds = Holds([7, 8, 9])
    core = _core(holds)

    async def call(method: str, name: str, arguments: list[Any]) -> Any:
        return utility(core, name, arguments)

    async def move() -> None:
        blocks = VllmBlocks(call, 1, Rendezvous("", {}, ""))
        blocks.open(tmp_path)
        try:
            assert await getattr(blocks, operation)("m", TRANSFER) == 2 * LAYERS * PAGE
        finally:
            blocks.close()

    asyncio.run(move())
    assert holds.stored == (["m"] if operation == "receive" else [])


def test_a_transfer_is_cut_off(tmp_path: Path) -> None:
    """One of which nobody hears the end, as its notice is lost."""
    core, aborted = _core(Holds([7, 8, 9])), []

    async def call(method: str, name: str, arguments: list[Any]) -> Any:
        if name == "abort":
            aborted.append(arguments)
        if name == "send":
            job = list(arguments[-1])
            job[job.index(str(tmp_path / "transfers"))] = str(tmp_path / "nobody")
            arguments = [*arguments[:-1], job]
        return utility(core, name, arguments)

    async def move() -> None:
        blocks = VllmBlocks(call, 1, Rendezvous("", {}, ""))
        blocks.open(tmp_path)
        try:
            with pytest.raises(EngineError, match="took more than 0"):
                await blocks.send("m", Transfer("a-0>b-0", "g", 1, 2, within=0.1))
        finally:
            blocks.close()

    asyncio.run(move())
    assert aborted == [["a-0>b-0"]]
