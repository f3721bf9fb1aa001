"""Blocks held for migrations, in vLLM's own block pool: none is ever lost or shared."""

from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from llumnix.engine.base import EngineError
from llumnix.engine.vllm.kv.block_holds import BlockHolds

SIZE, TOTAL = 4, 20
SPEC = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)


class Scheduler:
    """What a holds needs of vLLM's scheduler, around its real block manager."""

    def __init__(self, blocks: int = TOTAL, groups: int = 1, caching: bool = True) -> None:
        names = [[f"layer.{n}.{group}" for n in range(2)] for group in range(groups)]
        self.kv_cache_config = KVCacheConfig(
            blocks + 1, [], [KVCacheGroupSpec(layers, SPEC) for layers in names]
        )
        self.kv_cache_manager = KVCacheManager(
            self.kv_cache_config, 512, SIZE, SIZE, enable_caching=caching
        )
        self.block_size = SIZE
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.num_spec_tokens = 0
        self.block_holds = BlockHolds(self)
        init_none_hash(sha256)

    def run(self, name: str, tokens: list[int], computed: int | None = None) -> int:
        """A request whose first `computed` tokens, or all, are computed; how many were cached."""
        params: Any = SamplingParams(max_tokens=64)
        hasher = get_request_block_hasher(SIZE, sha256)
        request = Request(name, tokens, params, None, block_hasher=hasher)
        self.requests[name] = request
        self.running.append(request)
        cached = self.kv_cache_manager.get_computed_blocks(request)
        blocks, hit = cached[0], cached[1]
        count = len(tokens) if computed is None else computed
        assert self.kv_cache_manager.allocate_slots(request, count - hit, hit, blocks)
        request.num_computed_tokens = count
        return hit

    def grow(self, name: str, tokens: list[int]) -> None:
        """It has generated these, and computed all but the last of them."""
        request = self.requests[name]
        for token in tokens:
            assert self.kv_cache_manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1
            request.append_output_token_ids(token)

    def end(self, name: str) -> None:
        request = self.requests.pop(name)
        self.running.remove(request)
        self.kv_cache_manager.free(request)

    @property
    def free(self) -> int:
        return int(self.block_holds.books()["free"])


def prompt(seed: int, count: int) -> list[int]:
    return [1000 * seed + n for n in range(count)]


def test_a_request_is_exported_block_by_block_as_it_grows() -> None:
    scheduler = Scheduler()
    scheduler.run("r", prompt(1, 10))
    first, size = scheduler.block_holds.export("m", "r")
    assert len(first) == 2, "full blocks only"
    assert size == 2 * SPEC.page_size_bytes
    scheduler.grow("r", [7, 8, 9])
    second, _ = scheduler.block_holds.export("m", "r")
    assert second[:2] == first and len(second) == 3
    held = scheduler.kv_cache_manager.get_blocks("r").get_block_ids()[0][:3]
    assert scheduler.block_holds.ids("m", 0, 3) == held
    assert scheduler.block_holds.ids("m", 1, 2) == held[1:]


def test_blocks_stay_held_when_their_request_ends() -> None:
    scheduler = Scheduler()
    scheduler.run("r", prompt(1, 12))
    scheduler.block_holds.export("m", "r")
    held = scheduler.block_holds.ids("m", 0, 3)
    scheduler.end("r")
    assert scheduler.free == TOTAL - 3
    for n in range(3):  # others take all that there is
        scheduler.run(f"other{n}", prompt(2 + n, 20))
        taken = scheduler.kv_cache_manager.get_blocks(f"other{n}").get_block_ids()[0]
        assert not set(taken) & set(held)
    scheduler.block_holds.drop("m")
    for n in range(3):
        scheduler.end(f"other{n}")
    assert scheduler.free == TOTAL
    assert scheduler.block_holds.books()["held"] == scheduler.block_holds.books()["migrations"] == 0


def test_only_what_is_computed_leaves() -> None:
    """A request in its prefill has blocks for tokens whose KV is not there yet."""
    scheduler = Scheduler()
    scheduler.run("r", prompt(1, 16), computed=6)
    hashes, _ = scheduler.block_holds.export("m", "r")
    assert len(hashes) == 1


def test_what_arrived_is_found_as_a_prefix() -> None:
    source, destination = Scheduler(), Scheduler()
    source.run("r", prompt(1, 18))
    hashes, _ = source.block_holds.export("m", "r")
    assert destination.block_holds.reserve("m", hashes) == 0
    assert destination.free == TOTAL - 4
    destination.block_holds.store("m")
    assert destination.run("r", prompt(1, 18)) == 16
    arrived = destination.block_holds.ids("m", 0, 4)
    assert destination.kv_cache_manager.get_blocks("r").get_block_ids()[0][:4] == arrived
    destination.block_holds.drop("m")
    destination.end("r")
    assert destination.free == TOTAL


def test_blocks_that_are_there_already_are_not_sent_again() -> None:
    source, destination = Scheduler(), Scheduler()
    source.run("r", prompt(1, 18))
    destination.run("cousin", [*prompt(1, 8), 5, 5, 5, 5])
    destination.end("cousin")
    hashes, _ = source.block_holds.export("m", "r")
    assert destination.block_holds.reserve("m", hashes) == 2
    free = destination.free
    assert free == TOTAL - 4
    # They can't be evicted meanwhile.
    destination.run("other", prompt(9, 4 * free))
    destination.end("other")
    destination.block_holds.store("m")
    assert destination.run("r", prompt(1, 18)) == 16


def test_a_later_stage_asks_for_an_unbroken_prefix_only() -> None:
    source, destination = Scheduler(), Scheduler()
    source.run("r", prompt(1, 9))
    first, _ = source.block_holds.export("m", "r")
    assert destination.block_holds.reserve("m", first) == 0
    source.grow("r", [1, 2, 3, 4])
    second, _ = source.block_holds.export("m", "r")
    # The first stage has not arrived: what is behind it would hang in the air.
    assert destination.block_holds.reserve("m", second[2:]) == 0
    destination.block_holds.store("m")
    tokens = list(source.requests["r"].all_token_ids)
    assert destination.run("r", tokens) == 12


def test_no_room_is_a_refusal_that_leaves_nothing() -> None:
    source, destination = Scheduler(), Scheduler(blocks=8)
    source.run("r", prompt(1, 24))
    destination.run("other", prompt(2, 8))
    hashes, _ = source.block_holds.export("m", "r")
    with pytest.raises(EngineError, match="6 KV blocks are needed and 5 are free"):
        destination.block_holds.reserve("m", hashes)  # one is left for the request that runs
    assert (
        destination.block_holds.books()["held"]
        == destination.block_holds.books()["migrations"]
        == 0
    )
    assert destination.free == 6


def test_a_request_that_was_preempted_is_not_sent_on() -> None:
    scheduler = Scheduler()
    scheduler.run("r", prompt(1, 10))
    scheduler.block_holds.export("m", "r")
    request = scheduler.requests["r"]
    scheduler.kv_cache_manager.free(request)
    request.num_computed_tokens = 0
    with pytest.raises(EngineError, match="preempted"):
        scheduler.block_holds.export("m", "r")
    scheduler.block_holds.drop("m")
    assert scheduler.free == TOTAL


def test_a_request_that_is_not_here() -> None:
    scheduler = Scheduler()
    with pytest.raises(EngineError, match="request r has ended"):
        scheduler.block_holds.export("m", "r")
    with pytest.raises(EngineError, match="not held any more"):
        scheduler.block_holds.ids("m", 0, 1)
    with pytest.raises(EngineError, match="not held any more"):
        scheduler.block_holds.store("m")
    scheduler.block_holds.drop("m")


def test_without_prefix_caching_no_block_moves() -> None:
    scheduler = Scheduler(caching=False)
    scheduler.run("r", prompt(1, 10))
    assert scheduler.block_holds.export("m", "r")[0] == []
    with pytest.raises(EngineError, match="prefix caching is off"):
        scheduler.block_holds.reserve("m", [b"x"])


# ---- what is lent


class Workers:
    """Answers for the workers of the destination, and notes which blocks they filled."""

    def __init__(self, reads: bool = True, pulls: bool = True) -> None:
        self.reads, self.pulls = reads, pulls
        self.pulled: list[tuple[list[int], list[int]]] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[bool]:
        if method == "llumnix_reads":
            return [self.reads, True]
        _, _, theirs, mine = args
        self.pulled.append((theirs, mine))
        return [True, self.pulls]


def _moved(
    generated: int, workers: Workers, lent_at: int = 0
) -> tuple[Scheduler, Scheduler, Request, bool]:
    """A request of 10 tokens that is copied, lent after some more tokens, and then comes."""
    source, destination = Scheduler(), Scheduler()
    source.run("r", prompt(1, 10))
    source.requests["r"].append_output_token_ids(7)
    hashes, _ = source.block_holds.export("m", "r")
    destination.block_holds.reserve("m", hashes)
    destination.block_holds.store("m")
    source.grow("r", list(range(100, 100 + lent_at)))
    theirs = source.block_holds.lend("m", "r")
    destination.block_holds.expect("m", "r", "p", "g", theirs, workers)
    source.grow("r", list(range(200, 200 + generated)))
    tokens = list(source.requests["r"]._all_token_ids)
    params: Any = SamplingParams(max_tokens=64)
    hasher = get_request_block_hasher(SIZE, sha256)
    request = Request("r~2", tokens[:10], params, None, block_hasher=hasher)
    request.append_output_token_ids(tokens[10:])
    destination.requests["r~2"] = request
    return source, destination, request, destination.block_holds.adopt(request)


def test_a_request_comes_with_all_of_its_blocks() -> None:
    """Only its last token is left to compute; and every block is given back in the end."""
    workers = Workers()
    source, destination, request, adopted = _moved(1, workers)
    assert adopted
    assert request.num_computed_tokens == request.num_tokens - 1 == 11
    blocks = destination.kv_cache_manager.get_blocks("r~2").blocks[0]
    assert len(blocks) == 3
    theirs, mine = workers.pulled[0]
    assert len(theirs) == 1
    assert mine == [blocks[2].block_id]
    # As the scheduler does with one whose blocks a connector has loaded.
    assert destination.kv_cache_manager.allocate_slots(request, 1) is not None
    destination.block_holds.drop("m")
    destination.kv_cache_manager.free(request)
    assert destination.free == TOTAL
    source.block_holds.drop("m")
    source.end("r")
    assert source.free == TOTAL


def test_a_lent_block_that_is_full_meanwhile_enters_the_prefix_cache() -> None:
    _, destination, request, adopted = _moved(2, Workers())  # 13 tokens: three blocks are full
    assert adopted
    destination.kv_cache_manager.free(request)
    destination.block_holds.drop("m")
    assert destination.run("again", list(request._all_token_ids)) == 12


def test_a_block_that_was_begun_after_the_loan_is_computed_anew() -> None:
    workers = Workers()
    _, destination, request, adopted = _moved(7, workers)  # the fifth block is not among the lent
    assert not adopted
    assert request.num_computed_tokens == 0
    assert not workers.pulled
    destination.block_holds.drop("m")
    assert destination.free == TOTAL


@pytest.mark.parametrize("workers", [Workers(pulls=False)])
def test_a_worker_that_can_not_read_leaves_all_to_be_computed(workers: Workers) -> None:
    _, destination, request, adopted = _moved(1, workers)
    assert not adopted
    assert request.num_computed_tokens == 0
    destination.block_holds.drop("m")
    assert destination.free == TOTAL


def test_nothing_is_lent_where_it_can_not_be_read() -> None:
    with pytest.raises(EngineError, match="can't be read"):
        _moved(1, Workers(reads=False))


def test_a_loan_is_over_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the source might have given the blocks to another request."""
    monkeypatch.setattr("llumnix.engine.vllm.kv.block_holds.LEND_SECONDS", -1.0)
    workers = Workers()
    _, _, _, adopted = _moved(1, workers)
    assert not adopted
    assert not workers.pulled


def test_an_export_behind_a_loan_holds_no_block_twice() -> None:
    source, _, _, _ = _moved(3, Workers())
    source.block_holds.export("m", "r")
    source.block_holds.drop("m")
    source.end("r")
    assert source.free == TOTAL


def test_blocks_outside_a_sliding_window_are_not_lent() -> None:
    source = Scheduler()
    source.run("r", prompt(1, 10))
    blocks = source.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks["r"]
    source.block_holds.export("m", "r")
    source.block_holds.drop("m")
    held, blocks[0] = blocks[0], source.kv_cache_manager.block_pool.null_block
    assert source.block_holds.export("m", "r")[0] == []
    with pytest.raises(EngineError, match="not all blocks"):
        source.block_holds.lend("m", "r")
    blocks[0] = held


def test_an_adopted_request_gives_its_blocks_back() -> None:
    """When somebody who is before it needs the memory, and nobody runs."""
    _, destination, request, adopted = _moved(1, Workers())
    assert adopted
    destination.block_holds.disown(request)
    assert request.num_computed_tokens == 0
    assert destination.free == TOTAL
