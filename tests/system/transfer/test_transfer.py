"""KV blocks arrive as they left, or the transfer ends in time; then nothing touches them."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llumnix.engine.base import EngineError, Transfer
from llumnix.engine.vllm.kv import kv_memory as module
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from tests.kit.etcd import EtcdCluster
from tests.kit.loop import on_loop, soon
from tests.kit.workers import BLOCK_BYTES, BLOCKS, HEAD, HEADS, SIZE, Instance

LEAVING, COMING = [3, 17, 4, 9, 22], [20, 1, 2, 13, 7]
PAIR = "a-0--b-0"


def job(first: int = 0, count: int = 5, group: str = "one", within: float = 10.0) -> Transfer:
    return Transfer(PAIR, group, first, count, within)


@contextmanager
def _two(
    folder: Path, rendezvous: Rendezvous, ranks: int = 1, shape: tuple[int, ...] | None = None
) -> Iterator[tuple[Instance, Instance]]:
    more = {} if shape is None else {"shape": shape}
    source = Instance(1, LEAVING, rendezvous, ranks, **more).open(folder / "a")
    destination = Instance(2, COMING, rendezvous, ranks, **more).open(folder / "b")
    try:
        yield source, destination
    finally:
        lanes = [lane for w in (*source.workers, *destination.workers) for lane in w.lanes]
        source.close()
        destination.close()
        for lane in lanes:
            lane.join(10.0)
            assert not lane.is_alive()


async def _pass(source: Instance, destination: Instance, what: Transfer) -> list[int]:
    return await asyncio.gather(
        source.blocks.send("m", what), destination.blocks.receive("m", what)
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("blocks_a_chunk", [1, 2, 100])
def test_blocks_arrive_as_they_left(
    tmp_path: Path,
    rendezvous: Rendezvous,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    blocks_a_chunk: int,
) -> None:
    """In any number of chunks, and from rank i to rank i."""
    monkeypatch.setattr(module, "STAGING_BYTES", blocks_a_chunk * BLOCK_BYTES)

    @on_loop
    async def check() -> None:
        with _two(tmp_path, rendezvous, ranks) as (source, destination):
            others = [n for n in range(BLOCKS) if n not in COMING]
            before = [destination.content(rank, others) for rank in range(ranks)]
            sizes = await _pass(source, destination, job(count=3))
            assert sizes == [3 * ranks * BLOCK_BYTES] * 2
            await _pass(source, destination, job(first=3, count=2))
            assert destination.block_holds.stored == ["m", "m"]
            for rank in range(ranks):
                left, came = source.content(rank, LEAVING), destination.content(rank, COMING)
                assert all(map(torch.equal, left, came))
                assert all(map(torch.equal, before[rank], destination.content(rank, others)))
            assert source.blocks.cpu_seconds > 0

    check()


@pytest.mark.parametrize(
    "shape",
    [
        (2, BLOCKS, SIZE, HEADS, HEAD),  # FlashAttention's older layout: keys and values first
        (2 * BLOCKS, HEADS, SIZE // 2, 2 * HEAD),  # the kernel's blocks are half the manager's
    ],
)
def test_other_layouts_of_a_cache(
    tmp_path: Path, rendezvous: Rendezvous, shape: tuple[int, ...]
) -> None:
    @on_loop
    async def check() -> None:
        with _two(tmp_path, rendezvous, shape=shape) as (source, destination):
            await _pass(source, destination, job())
            for one, other in zip(
                source.workers[0].caches, destination.workers[0].caches, strict=True
            ):
                if shape[0] == 2:
                    assert torch.equal(one[:, LEAVING], other[:, COMING])
                else:
                    pairs = zip(LEAVING, COMING, strict=True)
                    for a, b in pairs:
                        assert torch.equal(one[2 * a : 2 * a + 2], other[2 * b : 2 * b + 2])

    check()


@on_loop
async def test_a_rendezvous_leaves_no_key(
    tmp_path: Path, rendezvous: Rendezvous, etcd_member: EtcdCluster, prefix: str
) -> None:
    with _two(tmp_path, rendezvous) as (source, destination):
        await _pass(source, destination, job())
        await _pass(source, destination, job())
        await soon(lambda: not etcd_member.ctl("get", "--prefix", prefix, "--keys-only").strip())


@pytest.mark.parametrize("alone", ["send", "receive"])
def test_the_other_end_never_comes(tmp_path: Path, rendezvous: Rendezvous, alone: str) -> None:
    """It is over in time, and the pair works again with a new group."""

    @on_loop
    async def check() -> None:
        with _two(tmp_path, rendezvous) as (source, destination):
            one = source if alone == "send" else destination
            with pytest.raises(EngineError, match="transfer"):
                await getattr(one.blocks, alone)("m", job(within=0.5))
            assert one.calls[-1] == "abort"
            await _pass(source, destination, job(group="two"))
            left, came = source.content(0, LEAVING), destination.content(0, COMING)
            assert all(map(torch.equal, left, came))

    check()


@pytest.mark.parametrize("alone", ["send", "receive"])
def test_the_other_end_goes_silent_behind_the_first_transfer(
    tmp_path: Path, rendezvous: Rendezvous, alone: str
) -> None:
    """The group stands, and its next operation is met by nobody."""

    @on_loop
    async def check() -> None:
        with _two(tmp_path, rendezvous) as (source, destination):
            await _pass(source, destination, job(count=2))
            one = source if alone == "send" else destination
            with pytest.raises(EngineError, match="transfer"):
                await getattr(one.blocks, alone)("m", job(within=0.4))
            assert one.calls[-1] == "abort"
            await _pass(source, destination, job(group="two"))
            left, came = source.content(0, LEAVING), destination.content(0, COMING)
            assert all(map(torch.equal, left, came))

    check()


@on_loop
async def test_a_transfer_that_is_cancelled_touches_no_block_any_more(
    tmp_path: Path, rendezvous: Rendezvous
) -> None:
    """When the cancellation has ended, the blocks may be given to another request."""
    with _two(tmp_path, rendezvous) as (source, destination):
        await _pass(source, destination, job(count=1))
        receiving = asyncio.ensure_future(destination.blocks.receive("m", job(count=5)))
        await soon(lambda: destination.calls.count("receive") == 2)
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        before = destination.content(0, COMING)
        with pytest.raises(EngineError, match="transfer"):
            await source.blocks.send("m", job(count=5, within=0.3))
        assert all(map(torch.equal, before, destination.content(0, COMING)))


@on_loop
async def test_a_worker_that_fails_is_told_with_its_reason(
    tmp_path: Path, rendezvous: Rendezvous
) -> None:
    with _two(tmp_path, rendezvous) as (source, destination):
        await _pass(source, destination, job(count=1))  # the group stands, whatever that takes
        source.block_holds.blocks = [BLOCKS + 5]  # there is no such block
        receiving = asyncio.ensure_future(destination.blocks.receive("m", job(count=1, within=1.0)))
        with pytest.raises(EngineError, match=r"a transfer failed: \w+Error: index out of range"):
            await source.blocks.send("m", job(count=1, within=1.0))
        with pytest.raises(EngineError, match="a transfer"):
            await receiving


@on_loop
async def test_an_engine_that_does_not_answer_is_given_up(
    tmp_path: Path, rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llumnix.engine.vllm.kv.kv_blocks.GRACE", 0.1)
    with _two(tmp_path, rendezvous) as (source, _):
        source.held.add("send")
        with pytest.raises(EngineError, match=r"a transfer took more than 0\.2 s"):
            await source.blocks.send("m", job(within=0.2))


@on_loop
async def test_closing_fails_what_is_under_way(tmp_path: Path, rendezvous: Rendezvous) -> None:
    with _two(tmp_path, rendezvous) as (source, _):
        sending = asyncio.ensure_future(source.blocks.send("m", job(within=0.5)))
        await soon(lambda: "send" in source.calls)
        source.blocks.close()
        with pytest.raises(EngineError, match="the engine has stopped"):
            await sending
