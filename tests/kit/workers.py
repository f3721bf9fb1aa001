"""Engines' workers without a model: KV tensors, real transfer threads, the real utility call."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llumnix.engine.vllm.kv.kv_blocks import Rendezvous, VllmBlocks
from llumnix.engine.vllm.kv.migration_utility import migration as utility
from llumnix.engine.vllm.kv.transfer import TransferExtension, _TransferLane

BLOCKS, HEADS, SIZE, HEAD = 24, 2, 16, 8
LAYERS = 3
BLOCK_BYTES = LAYERS * HEADS * SIZE * 2 * HEAD * 4


class Worker(TransferExtension):
    """One rank of an instance, whose KV cache holds what its seed says."""

    def __init__(self, rank: int, seed: int, shape: tuple[int, ...]) -> None:
        self.rank = rank
        draw = torch.Generator().manual_seed(seed)
        self.caches = [torch.rand(shape, generator=draw) for _ in range(LAYERS)]
        self.model_runner = SimpleNamespace(
            kv_caches=self.caches, kv_cache_config=SimpleNamespace(num_blocks=BLOCKS)
        )

    @property
    def lanes(self) -> list[_TransferLane]:
        return list(self._llumnix_all().values())

    def abort_all(self) -> None:
        for pair in list(self._llumnix_all()):
            self.llumnix_abort(pair)


class Holds:
    """Holds the blocks that a test names."""

    def __init__(self, blocks: list[int]) -> None:
        self.blocks = blocks
        self.stored: list[str] = []

    def ids(self, migration: str, first: int, count: int) -> list[int]:
        return self.blocks[first : first + count]

    def store(self, migration: str) -> None:
        self.stored.append(migration)


class Instance:
    """The blocks of one engine as its node sees them, over workers in this process."""

    def __init__(
        self,
        seed: int,
        blocks: list[int],
        rendezvous: Rendezvous,
        ranks: int = 1,
        shape: tuple[int, ...] = (BLOCKS, HEADS, SIZE, 2 * HEAD),
    ) -> None:
        self.workers = [Worker(rank, 100 * seed + rank, shape) for rank in range(ranks)]
        self.block_holds = Holds(blocks)
        self.calls: list[str] = []
        self.held: set[str] = set()  # operations that never reach the engine
        executor = SimpleNamespace(collective_rpc=self._rpc)
        self._core = SimpleNamespace(
            scheduler=SimpleNamespace(block_holds=self.block_holds), model_executor=executor
        )
        self.blocks = VllmBlocks(self._call, ranks, rendezvous)

    def open(self, folder: Path) -> "Instance":
        folder.mkdir()
        self.blocks.open(folder)
        return self

    def close(self) -> None:
        self.blocks.close()
        for worker in self.workers:
            worker.abort_all()

    def content(self, rank: int, blocks: list[int]) -> list[torch.Tensor]:
        """A copy of what these blocks hold, layer by layer."""
        return [cache[blocks].clone() for cache in self.workers[rank].caches]

    async def _call(self, method: str, operation: str, arguments: list[Any]) -> Any:
        self.calls.append(operation)
        if operation in self.held:
            await asyncio.Event().wait()
        return utility(self._core, operation, arguments)

    def _rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self.workers]
