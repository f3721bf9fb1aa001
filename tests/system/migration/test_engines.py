"""An engine dies, is full or refuses, at each step of a migration: the request runs on, once."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreRequest

from llumnix.control.keys import Keys
from llumnix.engine.base import EngineError
from llumnix.engine.sim.instance import SimEngine
from llumnix.migration.record import Handshake, MigrationRecord, MigrationState
from llumnix.migration.source import MigrationLimits
from tests.kit.loop import on_loop
from tests.kit.migrating import LAYOUTS, NEAR_AND_FAR, STEPS, THERE, TYPICAL, Control, before
from tests.kit.requests import answer
from tests.kit.scene import NAME, Scene, scene

every_step = pytest.mark.parametrize("step", STEPS)
everywhere = pytest.mark.parametrize("where", LAYOUTS)
typically = pytest.mark.parametrize("where", TYPICAL)
near_and_far = pytest.mark.parametrize("where", NEAR_AND_FAR)


def _kill(s: Scene, instance: str) -> None:
    s.cluster.engine(instance).die(f"instance {instance} died: killed")


@every_step
@typically
@on_loop
async def test_the_source_dies(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """Before the commit and after it: its API server resumes the request elsewhere."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        _kill(s, s.source)
        outcome = await s.go_on()
        assert (outcome == "moved") is (step == "resume"), outcome
        await s.is_at(s.destination)
        assert s.deaths() == (step != "resume")
        await s.moves_again()
        await s.ends_well()


@every_step
@typically
@on_loop
async def test_the_destination_dies(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """Before the commit the request stays; after it, it goes on where it can."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        _kill(s, s.destination)
        outcome = await s.go_on()
        late = step not in before("commit")
        assert outcome == "moved" if late else f"{s.destination} died: killed" in outcome, outcome
        await s.is_at(*((s.source, s.spare) if late else (s.source,)))
        if step not in ("resume", "hand over", "commit"):
            assert not s.deaths(), "it has never run there"
        await s.moves_again()
        await s.ends_well()


@every_step
@near_and_far
@on_loop
async def test_both_die(controls: dict[str, Control], keys: Keys, where: str, step: str) -> None:
    async with scene(controls, keys, LAYOUTS[where]) as s:
        await s.begin(step)
        _kill(s, s.source)
        _kill(s, s.destination)
        await s.go_on()
        await s.is_at(s.spare)
        await s.ends_well()


@pytest.mark.parametrize("step", before("receive"))
@near_and_far
@on_loop
async def test_the_destination_is_full(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    async with scene(controls, keys, LAYOUTS[where]) as s:
        model = s.cluster.engine(s.destination).model
        await s.begin(step)
        model.hold(63)
        assert "KV blocks are needed and 1 are free" in await s.go_on()
        model.hold(-63)
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


@near_and_far
@on_loop
async def test_the_destination_fills_up_between_two_stages(
    controls: dict[str, Control], keys: Keys, where: str
) -> None:
    """What it has received already is given back."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        model = s.cluster.engine(s.destination).model
        await s.begin("stage 2")
        assert model.held_blocks == 2
        model.hold(62)
        assert "1 KV blocks are needed and 0 are free" in await s.go_on()
        model.hold(-62)
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


class Refusing(SimEngine):
    """Takes no request that has tokens already."""

    async def add(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> None:
        raise EngineError("not today")


@everywhere
@on_loop
async def test_the_destination_does_not_take_what_is_handed_over(
    controls: dict[str, Control], keys: Keys, where: str
) -> None:
    async with scene(controls, keys, LAYOUTS[where], engine=Refusing) as s:
        assert await s.cluster.move(NAME, s.source, s.destination) == "moved"
        await s.is_at(s.source, s.spare)
        assert not s.deaths() and s.home.decisions == 2
        await s.ends_well()


@near_and_far
@on_loop
async def test_the_destination_cannot_resume(
    controls: dict[str, Control], keys: Keys, where: str
) -> None:
    async with scene(controls, keys, LAYOUTS[where]) as s:
        hosted = s.cluster.hosted(s.destination)
        assert hosted.facts is not None
        able, hosted.facts = hosted.facts, replace(hosted.facts, resumes=False)
        assert "can't resume requests" in await s.cluster.move(NAME, s.source, s.destination)
        hosted.facts = able
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


# ---- what takes too long ----

HASTY = MigrationLimits(within=0.5)


@pytest.mark.parametrize("step", [step for step in STEPS if step in THERE - {"resume"}])
@typically
@on_loop
async def test_the_destination_is_slow(
    controls: dict[str, Control], keys: Keys, where: str, step: str
) -> None:
    """It is given up, and does nothing more when it comes round."""
    async with scene(controls, keys, LAYOUTS[where], limits=HASTY) as s:
        await s.begin(step)
        assert await s.outcome() == f"{s.destination} did not answer in time"
        assert s.cluster.where(NAME) == [s.source]
        s.release()
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


class Late(Handshake):
    """Takes its time to say that an arrival is accepted."""

    says_so = threading.Event()

    def advance(
        self, request: str, migration: str, expected: MigrationState, to: MigrationState
    ) -> MigrationRecord:
        record = super().advance(request, migration, expected, to)
        if to is MigrationState.ACCEPTED:
            assert Late.says_so.wait(10.0)
        return record


@on_loop
async def test_it_is_accepted_too_late(controls: dict[str, Control], keys: Keys) -> None:
    """The record says that it may come; the source has given it up, and the destination sees it."""
    Late.says_so.clear()
    layout = LAYOUTS["API server elsewhere"]
    async with scene(controls, keys, layout, limits=HASTY, handshake=Late) as s:
        outcome = await s.cluster.move(NAME, s.source, s.destination)
        assert outcome == f"{s.destination} did not answer in time"
        Late.says_so.set()
        await s.is_at(s.source)
        await s.moves_again()
        await s.ends_well()


@pytest.mark.parametrize("side", ["send", "receive", "both"])
@everywhere
@on_loop
async def test_the_transfer_hangs(
    controls: dict[str, Control], keys: Keys, where: str, side: str
) -> None:
    """The blocks of both sides are given back, and the next transfer is made in a new group."""
    async with scene(controls, keys, LAYOUTS[where], limits=HASTY) as s:
        source, destination = (s.cluster.engine(i).blocks for i in (s.source, s.destination))
        groups: list[str] = []
        ended: list[str] = []

        async def hang(migration: str, transfer: Any) -> int:
            groups.append(transfer.group)
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(transfer.group)
            return 0

        if side != "receive":
            source.send = hang  # type: ignore[method-assign]
        if side != "send":
            destination.receive = hang  # type: ignore[method-assign]
        outcome = await s.cluster.move(NAME, s.source, s.destination)
        assert outcome == f"{s.destination} did not answer in time"
        await s.is_at(s.source)
        assert len(groups) == len(ended) == 1 + (side == "both"), "no transfer is left behind"
        for blocks, method in ((source, "send"), (destination, "receive")):
            vars(blocks).pop(method, None)
        kept = source.send

        async def note(migration: str, transfer: Any) -> int:
            groups.append(transfer.group)
            return await kept(migration, transfer)

        source.send = note  # type: ignore[method-assign]
        await s.moves_again()
        assert groups[-1] != groups[0]
        await s.ends_well()


@pytest.mark.parametrize("fails", ["send", "receive"])
@near_and_far
@on_loop
async def test_one_end_of_a_transfer_fails_while_the_other_hangs(
    controls: dict[str, Control], keys: Keys, where: str, fails: str
) -> None:
    """The other end is ended too, before its blocks are given back."""
    async with scene(controls, keys, LAYOUTS[where]) as s:
        source, destination = (s.cluster.engine(i).blocks for i in (s.source, s.destination))
        hanging = asyncio.Event()
        ended: list[bool] = []

        async def fail(migration: str, transfer: Any) -> int:
            await hanging.wait()
            raise EngineError("the cable is cut")

        async def hang(migration: str, transfer: Any) -> int:
            hanging.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(bool(source.held if fails == "receive" else destination.held))
            return 0

        source.send = fail if fails == "send" else hang  # type: ignore[method-assign]
        destination.receive = fail if fails == "receive" else hang  # type: ignore[method-assign]
        assert await s.cluster.move(NAME, s.source, s.destination) == "the cable is cut"
        await s.is_at(s.source)
        assert ended == [True]
        del source.send, destination.receive
        await s.moves_again()
        await s.ends_well()


@near_and_far
@on_loop
async def test_the_source_makes_no_progress(
    controls: dict[str, Control], keys: Keys, where: str
) -> None:
    """A request that never stands behind an output is not handed over."""
    async with scene(controls, keys, LAYOUTS[where], limits=HASTY) as s:
        hosted = s.cluster.hosted(s.source)
        paced = hosted.__dict__.pop("next_output")
        assert "made no progress for 0.5 s" in await s.cluster.move(NAME, s.source, s.destination)
        hosted.next_output = paced  # type: ignore[method-assign]
        await s.is_at(s.source)
        assert s.stream.tokens == answer(list(range(100, 140)), 5)
        await s.moves_again()
        await s.ends_well()
