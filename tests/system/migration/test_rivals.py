"""Migrations that want the same: one request, one instance's room, one pair in both directions."""

import asyncio

import pytest

from llumnix import metrics
from llumnix.control.keys import Keys
from llumnix.engine.base import EngineError
from llumnix.migration.messages import Move
from llumnix.migration.record import MigrationRecord
from llumnix.migration.source import MigrationLimits
from tests.kit.invariants import check_invariants
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import Stream
from tests.kit.migrating import LAYOUTS, NEAR_AND_FAR, STEPS, Cluster, Control, before, cluster
from tests.kit.scene import NAME, scene

everywhere = pytest.mark.parametrize("where", LAYOUTS)

LENGTH = 200  # tokens: while one migration waits for outputs, the requests of all others go on


# ---- the same request ----


@pytest.mark.parametrize("step", before("resume"))
@pytest.mark.parametrize("where", NEAR_AND_FAR)
@on_loop
async def test_a_second_migration_of_a_request_is_refused(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        outcome = await s.cluster.move(NAME, s.source, s.spare)
        assert outcome == f"request {NAME} is moving already"
        assert await s.go_on() == "moved"
        await s.is_at(s.destination)
        await s.moves_again()
        await s.ends_well()


@on_loop
async def test_a_request_that_has_a_record_is_not_moved(
    controls: dict[str, Control], keys: Keys
) -> None:
    """Another node is at it, as far as one knows."""
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        record = MigrationRecord(NAME, "b-7", "c-7", 1)
        handshake = s.cluster.sites["b"].handshake
        handshake.propose(record)
        outcome = await s.cluster.move(NAME, s.source, s.destination)
        assert "has a migration from b-7 to c-7 already, which is proposed" in outcome
        assert handshake.read(NAME) == record, "it is left alone"
        await asyncio.to_thread(handshake.remove, NAME, record.migration)
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


@on_loop
async def test_it_moves_on_before_its_first_output(
    controls: dict[str, Control], keys: Keys
) -> None:
    """Its former move still waits at the destination for the request to begin there."""
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        await s.begin("resume")
        assert await s.cluster.move(NAME, s.destination, s.spare) == "moved"
        assert await s.go_on() == "moved"
        await s.is_at(s.spare)
        assert await s.cluster.move(NAME, s.spare, s.source) == "moved"
        await s.is_at(s.source)
        await s.ends_well()


@pytest.mark.parametrize("to", ["itself", "nowhere", "where all leave"])
@on_loop
async def test_a_move_that_makes_no_sense(
    controls: dict[str, Control], keys: Keys, to: str
) -> None:
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        there, why = {
            "itself": (s.source, f"is at {s.source} already"),
            "nowhere": ("z-9", "there is no instance z-9"),
            "where all leave": (s.destination, f"instance {s.destination} is about to stop"),
        }[to]
        s.cluster.emptied.add(s.destination)
        assert why in await s.cluster.move(NAME, s.source, there)
        await s.ends_well()


# ---- limits ----


async def _many(whole: Cluster, count: int) -> list[Stream]:
    """So many requests at the first instance, which all have begun."""
    streams = [
        await whole.ask("a", f"r{n}", LENGTH, prompt=[n * 100 + i for i in range(40)])
        for n in range(count)
    ]
    source = whole.order[0]
    await soon(lambda: len(whole.hosted(source).requests) == count and whole.paces[source].waiting)
    while not all(stream.tokens for stream in streams):
        await whole.paces[source].step()
        await asyncio.sleep(0.01)  # for its outputs to arrive, before the next one
    return streams


async def _all_end(whole: Cluster, streams: list[Stream]) -> None:
    await check_invariants(whole)
    whole.open()
    await soon(lambda: all(stream.ended for stream in streams))
    for n, stream in enumerate(streams):
        assert stream.tokens == whole.answers[f"r{n}"]
    await check_invariants(whole)


@pytest.mark.parametrize("destination", ["a", "b"])
@on_loop
async def test_only_so_many_requests_leave_at_a_time(
    controls: dict[str, Control], keys: Keys, destination: str
) -> None:
    async with cluster(controls, keys, requests_limit=2) as whole:
        source, there = await whole.host("a"), await whole.host(destination)
        streams = await _many(whole, 3)
        stops = [whole.stop("copy"), whole.stop("copy")]
        moves = []
        for n, stop in enumerate(stops):
            moves.append(whole.move(f"r{n}", source, there))
            await stop.reached.wait()
        refused = await whole.move("r2", source, there)
        assert refused == f"2 requests leave instance {source} already"
        for stop in stops:
            stop.release()
        assert await asyncio.gather(*moves) == ["moved", "moved"]
        await check_invariants(whole)
        assert await whole.move("r2", source, there) == "moved"
        await _all_end(whole, streams)


@on_loop
async def test_only_so_many_requests_come_at_a_time(
    controls: dict[str, Control], keys: Keys
) -> None:
    """From different nodes, none of which has too many of its own."""
    async with cluster(controls, keys, requests_limit=1) as whole:
        source, there = await whole.host("a"), await whole.host("c")
        streams = await _many(whole, 2)
        other = await whole.host("b")
        assert await whole.move("r1", source, other) == "moved"
        await check_invariants(whole)
        stop = whole.stop("copy")
        first = whole.move("r0", source, there)
        await stop.reached.wait()
        refused = await whole.move("r1", other, there)
        assert refused == f"1 requests come to instance {there} already"
        stop.release()
        assert await first == "moved"
        await check_invariants(whole)
        assert await whole.move("r1", other, there) == "moved"
        await _all_end(whole, streams)


@on_loop
async def test_only_so_many_blocks_at_a_time(controls: dict[str, Control], keys: Keys) -> None:
    """Two requests of three blocks each are one too many."""
    async with cluster(controls, keys, blocks_limit=5) as whole:
        source, there = await whole.host("a"), await whole.host("b")
        streams = await _many(whole, 2)
        stop = whole.stop("copy")
        first = whole.move("r0", source, there)
        await stop.reached.wait()
        refused = await whole.move("r1", source, there)
        assert refused == f"6 KV blocks would leave instance {source} at once"
        stop.release()
        assert await first == "moved"
        await check_invariants(whole)
        assert await whole.move("r1", source, there) == "moved"
        await _all_end(whole, streams)


@on_loop
async def test_a_request_that_is_larger_than_the_limit_moves_alone(
    controls: dict[str, Control], keys: Keys
) -> None:
    async with scene(controls, keys, LAYOUTS["API server elsewhere"], blocks_limit=1) as s:
        assert await s.cluster.move(NAME, s.source, s.destination) == "moved"
        await s.is_at(s.destination)
        await s.ends_well()


@everywhere
@on_loop
async def test_too_much_is_left_after_the_last_stage(
    controls: dict[str, Control], keys: Keys, where: str
) -> None:
    limits = MigrationLimits(max_stages=1, last_stage_max_blocks=0)
    async with scene(controls, keys, LAYOUTS[where], limits=limits) as s:
        await s.begin("stage 1")
        await s.let(20)
        assert await s.go_on() == "after 1 stages 2 blocks are left to copy"
        await s.is_at(s.source)
        assert await s.cluster.move(NAME, s.source, s.destination) == "moved"
        await s.is_at(s.destination)
        await s.ends_well()


@pytest.mark.parametrize("stages", [1, 2, 3])
@on_loop
async def test_it_takes_no_more_stages_than_it_may(
    controls: dict[str, Control], keys: Keys, stages: int
) -> None:
    """Whatever the request generates meanwhile; and no more than it needs."""
    limits = MigrationLimits(max_stages=stages, last_stage_max_blocks=4)
    async with scene(controls, keys, LAYOUTS["API server elsewhere"], limits=limits) as s:
        site = s.cluster.sites["a"].migrations
        report = await site.command("a", s.source, Move(s.destination, "operator", NAME))
        assert report.stages == min(stages, 2)
        assert report.blocks_sent == report.stages + 1
        await s.is_at(s.destination)
        await s.ends_well()


# ---- leaders ----


@on_loop
async def test_a_deposed_leader_is_refused_and_counted(
    controls: dict[str, Control], keys: Keys
) -> None:
    async with scene(controls, keys, LAYOUTS["API server elsewhere"]) as s:
        s.cluster.leader_epoch = 8
        counted = metrics.MIGRATION_CONFLICTS._value.get()
        for asks in ("a", "b", "c"):
            command = s.cluster.sites[asks].migrations.command
            with pytest.raises(EngineError, match="epoch 7 is over: node a leads in epoch 8"):
                await command("a", s.source, Move(s.destination, "balance", epoch=7))
        assert metrics.MIGRATION_CONFLICTS._value.get() == counted + 3
        await s.is_at(s.source)
        report = await command("a", s.source, Move(s.destination, "drain", epoch=8))
        assert report.outcome == "moved" and report.request == NAME
        await s.is_at(s.destination)
        await s.ends_well()


# ---- both directions ----


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("nodes", ["aa", "ab"])
@on_loop
async def test_both_directions_at_once(
    controls: dict[str, Control], keys: Keys, nodes: str, step: str
) -> None:
    """Two instances exchange their requests, each stopped at the same step: none waits for ever."""
    async with cluster(controls, keys) as whole:
        one, other = await whole.host(nodes[0]), await whole.host(nodes[1])
        streams = await _many(whole, 2)
        assert await whole.move("r1", one, other) == "moved"
        await check_invariants(whole)
        stops = [whole.stop(step), whole.stop(step)]
        moves = [whole.move("r0", one, other), whole.move("r1", other, one)]
        for stop in stops:
            await stop.reached.wait()
        for stop in stops:
            stop.release()
        assert await asyncio.gather(*moves) == ["moved", "moved"]
        await check_invariants(whole)
        assert (whole.where("r0"), whole.where("r1")) == ([other], [one])
        await _all_end(whole, streams)
