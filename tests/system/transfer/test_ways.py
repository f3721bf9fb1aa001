"""Two workers agree on a way for blocks, take the next one, or know that there is none."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llumnix.engine.base import SetupFailed, Transfer
from llumnix.engine.vllm.kv import memory_carrier, peer_memory
from llumnix.engine.vllm.kv.carrier import LADDER, RECEIVER, SENDER, WorkerPlace, ways
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.kv.kv_memory import KvMemory
from tests.kit.etcd import EtcdCluster
from tests.kit.loop import on_loop
from tests.kit.workers import BLOCKS, HEAD, HEADS, SIZE, Instance

LEAVING, COMING = [3, 17, 4], [20, 1, 2]
PAIR = "a-0--b-0"


@pytest.fixture
def meeting(etcd_member: EtcdCluster, prefix: str) -> Rendezvous:
    arguments = {"endpoints": list(etcd_member.endpoints), "prefix": prefix}
    return Rendezvous("llumnix.control.c10d_store.EtcdStore", arguments, "127.0.0.1")


@contextmanager
def two(folder: Path, rendezvous: Rendezvous) -> Iterator[tuple[Instance, Instance]]:
    source = Instance(1, LEAVING, rendezvous).open(folder / "a")
    destination = Instance(2, COMING, rendezvous).open(folder / "b")
    try:
        yield source, destination
    finally:
        source.close()
        destination.close()


def job(group: str = "one", skips: int = 0, count: int = 3) -> Transfer:
    return Transfer(PAIR, group, 0, count, 5.0, skips)


async def passes(source: Instance, destination: Instance, what: Transfer) -> None:
    await asyncio.gather(source.blocks.send("m", what), destination.blocks.receive("m", what))
    left, came = source.content(0, LEAVING), destination.content(0, COMING)
    assert all(map(torch.equal, left, came))


def kind(instance: Instance) -> str:
    (lane,) = instance.workers[0].lanes
    assert lane.carrier is not None
    return lane.carrier.kind


@on_loop
async def test_the_best_way_is_taken_and_the_next_one_when_it_is_skipped(
    tmp_path: Path, meeting: Rendezvous
) -> None:
    with two(tmp_path, meeting) as (source, destination):
        await passes(source, destination, job())
        assert kind(source) == kind(destination) == "memory"
        assert source.blocks.reads(PAIR)
        await passes(source, destination, job("two", skips=1))
        assert kind(source) == "group"
        assert not source.blocks.reads(PAIR)


@on_loop
async def test_instances_meet_before_anything_is_sent(tmp_path: Path, meeting: Rendezvous) -> None:
    with two(tmp_path, meeting) as (source, destination):
        what = job(count=0)
        await asyncio.gather(source.blocks.meet(what, True), destination.blocks.meet(what, False))
        assert source.blocks.reads(PAIR)
        carrier = source.workers[0].lanes[0].carrier
        await passes(source, destination, job())
        assert source.workers[0].lanes[0].carrier is carrier


@on_loop
async def test_memory_that_can_not_be_read_is_left_at_once_for_the_next_way(
    tmp_path: Path, meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(peer_memory, "_read", refuse)
    with two(tmp_path, meeting) as (source, destination):
        await passes(source, destination, job())
        assert kind(source) == kind(destination) == "group"


@on_loop
async def test_with_no_way_left_both_know_it(tmp_path: Path, meeting: Rendezvous) -> None:
    with two(tmp_path, replace(meeting, ladder=("memory",))) as (source, destination):
        what = job(skips=1)
        found = await asyncio.gather(
            source.blocks.meet(what, True),
            destination.blocks.meet(what, False),
            return_exceptions=True,
        )
        assert all(isinstance(one, SetupFailed) for one in found), found


@on_loop
async def test_a_stranger_at_the_door_gets_nothing(
    tmp_path: Path, meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not know the key is sent away, and the one who does still comes in."""
    shown: list[bytes] = []
    connect = memory_carrier.socket.create_connection

    def with_a_stranger_before(address: Any, timeout: float) -> Any:
        stranger = connect(address, timeout)
        stranger.sendall(b"x" * 16)
        stranger.settimeout(2.0)
        shown.append(stranger.recv(1))
        stranger.close()
        return connect(address, timeout)

    monkeypatch.setattr(memory_carrier.socket, "create_connection", with_a_stranger_before)
    with two(tmp_path, meeting) as (source, destination):
        await passes(source, destination, job())
        assert kind(source) == "memory"
        assert shown == [b""]


def test_two_processes_on_one_gpu_never_take_nccl() -> None:
    here = {"host": "h", "ladder": list(LADDER)}
    one = WorkerPlace(device="gpu-1", memory={"handles": []}, **here)
    beside = WorkerPlace(device="gpu-1", **here)
    assert ways(one, beside, SENDER) == ways(beside, one, RECEIVER) == ["memory", "host"]
    assert ways(one, WorkerPlace(device="gpu-2", **here), SENDER) == ["memory", "group", "host"]
    far = WorkerPlace(host="other", device="gpu-2", ladder=list(LADDER))
    assert ways(one, far, SENDER) == ["group", "host"]
    assert not ways(one, WorkerPlace(host="other", device="gpu-2", ladder=["memory"]), SENDER)


@pytest.mark.parametrize(
    "shape",
    [
        (BLOCKS, HEADS, SIZE, 2 * HEAD),
        (2, BLOCKS, SIZE, HEADS, HEAD),
        (2 * BLOCKS, HEADS, SIZE // 2, 2 * HEAD),
    ],
)
def test_pieces_are_the_bytes_of_a_block(shape: tuple[int, ...]) -> None:
    tensor = torch.rand(shape)
    memory = KvMemory([tensor], BLOCKS)
    assert memory.pieces is not None
    raw = bytes(tensor.untyped_storage())
    for block in (0, 5, BLOCKS - 1):
        mine = b"".join(
            raw[p.offset + block * p.stride : p.offset + block * p.stride + p.length]
            for p in memory.pieces
        )
        whole = memory.layers[0][block].contiguous()
        assert sorted(mine) == sorted(whole.view(torch.uint8).flatten().tolist())
        assert len(mine) == memory.block_bytes


def test_a_layout_that_scatters_blocks_is_not_copied_by_pieces() -> None:
    tensor = torch.rand(HEADS * SIZE * HEAD, BLOCKS).t()
    memory = KvMemory([tensor], BLOCKS)
    assert memory.pieces is None
    assert peer_memory.export(memory) is None
