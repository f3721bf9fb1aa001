"""The scheduler's side of a migration: KV blocks held while they leave, or until they are needed.

It lives in the engine core and is called between steps. Blocks are vLLM's own, taken from its block
pool and given back to it: a block that is held is neither freed nor used for anything else,
whatever becomes of its request meanwhile. Blocks that arrive enter the prefix cache under their
ordinary hashes, where the resumed request finds them like any other prefix.
"""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request

from llumnix.engine.base import LEND_SECONDS, EngineError, NoRoom, RequestEnded


@dataclass(slots=True)
class _HeldBlocks:
    hashes: list[bytes] = field(default_factory=list)  # of all blocks from the first on
    blocks: list[KVCacheBlock] = field(default_factory=list)
    cached: int = 0  # how many of them are in the prefix cache
    tail: list[KVCacheBlock] = field(default_factory=list)  # behind them: lent, or to be filled


@dataclass(frozen=True, slots=True)
class _Loan:
    """Blocks of another engine that a request will need when it comes here."""

    migration: str
    pair: str
    group: str
    theirs: list[int]
    until: float  # monotonic
    workers: Any  # the executor


class BlockHolds:
    """The KV blocks that an engine holds for migrations, outgoing and incoming ones."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self._held: dict[str, _HeldBlocks] = {}
        self._loans: dict[str, _Loan] = {}  # by the request's id

    @property
    def why_not(self) -> str | None:
        """Why KV blocks can't move, so that requests move by recomputing; None if they can."""
        if not self._manager.enable_caching:
            return "prefix caching is off"
        if len(self._scheduler.kv_cache_config.kv_cache_groups) != 1:
            return "the model has several groups of KV caches"
        if self._manager.coordinator.block_pool.hash_block_size != self._scheduler.block_size:
            return "the prefix cache counts in other blocks than the KV cache"
        if self._pool.enable_kv_cache_events:
            return "KV cache events are on"
        return None

    @property
    def block_bytes(self) -> int:
        """What a block takes in each worker."""
        groups = self._scheduler.kv_cache_config.kv_cache_groups
        return sum(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups)

    def export(self, migration: str, request_id: str) -> tuple[list[bytes], int]:
        """Hold all full blocks of a request; their hashes, and the bytes of each in a worker.

        Raises EngineError if the request is not here any more.
        """
        request = self._scheduler.requests.get(request_id)
        if request is None:
            raise RequestEnded(f"request {request_id} has ended")
        if self.why_not is not None:
            return [], self.block_bytes
        held = self._held.setdefault(migration, _HeldBlocks())
        size = self._scheduler.block_size
        full = min(request.num_computed_tokens // size, len(request.block_hashes))
        blocks = list(self._manager.get_blocks(request_id).blocks[0][:full])  # () if it waits
        if any(block.is_null for block in blocks):  # outside a sliding window
            return [], self.block_bytes
        fresh = blocks[len(held.blocks) :]
        kept = held.tail[: len(fresh)]  # which were lent, and are full by now
        gone = held.blocks and not blocks
        if gone or blocks[: len(held.blocks)] != held.blocks[:full]:
            raise EngineError(f"request {request_id} was preempted")
        if kept != fresh[: len(kept)]:
            raise EngineError(f"request {request_id} was preempted")
        del held.tail[: len(kept)]
        self._pool.touch(fresh[len(kept) :])
        held.blocks += fresh
        held.hashes = list(request.block_hashes[: len(held.blocks)])
        return held.hashes, self.block_bytes

    def reserve(self, migration: str, hashes: list[bytes]) -> int:
        """Hold room for further blocks with these hashes; how many of them are here already.

        Raises EngineError if there is no room.
        """
        if self.why_not is not None:
            raise EngineError(f"no KV blocks can be taken: {self.why_not}")
        held = self._held.setdefault(migration, _HeldBlocks())
        present: list[KVCacheBlock] = []
        if held.cached == len(held.blocks):  # only an unbroken prefix is of use
            for block_hash in hashes:
                found = self._pool.get_cached_block(block_hash, [0])
                if found is None:
                    break
                present.append(found[0])
        self._pool.touch(present)
        held.blocks += present
        held.hashes += hashes[: len(present)]
        held.cached += len(present)
        missing = hashes[len(present) :]
        # What is running here must be able to go on: one more block for each request.
        free = self._pool.get_num_free_blocks() - len(self._scheduler.running)
        if len(missing) > free:
            self.drop(migration)
            raise NoRoom(f"{len(missing)} KV blocks are needed and {max(free, 0)} are free")
        if missing:
            held.blocks += self._pool.get_new_blocks(len(missing))
            held.hashes += missing
        return len(present)

    def ids(self, migration: str, first: int, count: int) -> list[int]:
        """The ids of a migration's blocks from `first` on. Raises EngineError if it has fewer."""
        held = self._held.get(migration)
        if held is None or first + count > len(held.blocks):
            raise EngineError(f"the blocks of migration {migration} are not held any more")
        return [block.block_id for block in held.blocks[first : first + count]]

    def store(self, migration: str) -> None:
        """Put the blocks that have arrived into the prefix cache; they stay held.

        Raises EngineError if the migration was dropped meanwhile.
        """
        held = self._held.get(migration)
        if held is None:
            raise EngineError(f"the blocks of migration {migration} are not held any more")
        request = SimpleNamespace(block_hashes=held.hashes)
        size = self._scheduler.block_size
        self._pool.cache_full_blocks(request, held.blocks, held.cached, len(held.blocks), size, 0)
        held.cached = len(held.blocks)

    def lend(self, migration: str, request_id: str) -> list[int]:
        """Hold also the request's blocks behind those that were exported; the ids of these.

        The last of them is being filled. Raises EngineError if the request is not here any more.
        """
        held = self._held.get(migration)
        if held is None or request_id not in self._scheduler.requests:
            raise RequestEnded(f"request {request_id} has ended")
        blocks = list(self._manager.get_blocks(request_id).blocks[0])
        if blocks[: len(held.blocks)] != held.blocks:
            raise EngineError(f"request {request_id} was preempted")
        if self.why_not is not None or any(block.is_null for block in blocks):
            # A sliding window's are not.
            raise EngineError("not all blocks of the request are there")
        tail = blocks[len(held.blocks) :]
        self._pool.touch(tail[len(held.tail) :])
        held.tail = tail
        return [block.block_id for block in tail]

    def expect(
        self,
        migration: str,
        request_id: str,
        pair: str,
        group: str,
        theirs: list[int],
        workers: Any,
    ) -> None:
        """Hold room for blocks that the request will need besides, and copy them when it comes.

        Raises EngineError if there is no room, or the other instance's memory can't be read.
        """
        if self._scheduler.num_spec_tokens:
            raise EngineError("a draft model wants to see the last tokens itself")
        if not all(workers.collective_rpc("llumnix_reads", args=(pair, group))):
            raise EngineError("the other instance's memory can't be read")
        held = self._held.setdefault(migration, _HeldBlocks())
        more = len(theirs) - len(held.tail)
        if more > self._pool.get_num_free_blocks():
            raise EngineError(f"{more} KV blocks are needed for what is lent")
        if more > 0:
            held.tail += self._pool.get_new_blocks(more)
        until = time.monotonic() + LEND_SECONDS
        self._loans[request_id] = _Loan(migration, pair, group, theirs, until, workers)

    def hashes_of(self, request_id: str) -> list[bytes]:
        """Of the full blocks that are here for a request which is to come; else none."""
        loan = self._loans.get(request_id.rpartition("~")[0])
        if loan is None or time.monotonic() > loan.until:
            return []
        held = self._held.get(loan.migration)
        return held.hashes if held is not None else []

    def adopt(self, request: Request) -> bool:
        """Give a request that comes all its blocks, where they have arrived or are lent.

        It then looks to the scheduler like one whose blocks a KV connector has loaded: all of its
        tokens are computed but the last, so its first step is an ordinary one of decoding, which a
        GPU runs as a CUDA graph. If anything is not as expected, it is scheduled as if nothing was
        lent, and finds its full blocks in the prefix cache.
        """
        loan = self._loans.pop(request.request_id.rpartition("~")[0], None)
        if loan is None or time.monotonic() > loan.until:
            return False
        if getattr(self._scheduler, "pause_state", PauseState.UNPAUSED) != PauseState.UNPAUSED:
            return False  # what holds memory may be run though new requests are not
        held = self._held.get(loan.migration)
        if held is None or held.cached != len(held.blocks) or request.num_computed_tokens:
            return False
        size, computed = self._scheduler.block_size, request.num_tokens - 1
        covered = len(held.blocks)
        needed = -(-computed // size) - covered
        known = request.block_hashes[:covered] == held.hashes
        if not (known and 0 < needed <= min(len(held.tail), len(loan.theirs))):
            return False
        mine = [block.block_id for block in held.tail[:needed]]
        arguments = (loan.pair, loan.group, loan.theirs[:needed], mine)
        if not all(loan.workers.collective_rpc("llumnix_pull", args=arguments)):
            return False
        blocks, spare = held.blocks + held.tail[:needed], held.tail[needed:]
        del self._held[loan.migration]
        self._pool.free_blocks(reversed(spare))
        manager = self._manager.coordinator.single_type_managers[0]
        manager.req_to_blocks[request.request_id].extend(blocks)
        manager.num_cached_block[request.request_id] = covered
        request.num_computed_tokens = computed
        self._manager.cache_blocks(request, computed)
        return True

    def disown(self, request: Request) -> None:
        """Take the blocks back from an adopted request that waits; it finds most of them again."""
        self._manager.free(request)
        request.num_computed_tokens = 0

    def drop(self, migration: str) -> None:
        """Give all blocks of a migration back to the pool; unknown ones are no error."""
        held = self._held.pop(migration, None)
        for request_id in [r for r, loan in self._loans.items() if loan.migration == migration]:
            del self._loans[request_id]
        if held is not None:
            self._pool.free_blocks(reversed(held.blocks + held.tail))  # the last go first

    def books(self) -> dict[str, int]:
        """Blocks in all, free ones, and those held for migrations; for checks."""
        return {
            "total": self._pool.num_gpu_blocks - 1,  # one is the null block
            "free": self._pool.get_num_free_blocks(),
            "held": sum(len(held.blocks) + len(held.tail) for held in self._held.values()),
            "migrations": len(self._held),
            "requests": len(self._scheduler.requests),
        }
