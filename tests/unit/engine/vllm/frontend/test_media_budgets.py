"""What all requests of a node decode at a time: they wait for each other, and not for ever."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.multimodal.media import AudioMediaIO

from llumnix.engine.vllm.frontend import media_budgets
from llumnix.engine.vllm.frontend.media_budgets import MediaBudget, MediaRoom, media_budget
from llumnix.metrics import REFUSALS
from tests.kit.loop import on_loop, soon
from tests.unit.engine.vllm.frontend.test_media import MIB, connector, image, url

IMAGE = url("image/png", image())  # of 1 MiB when it is decoded


class Request:
    """One that loads images, and holds what it has loaded."""

    def __init__(self, room: MediaRoom, **most: int) -> None:
        self.budget = MediaBudget(room=room, **most)
        self.images: list[Any] = []
        self.errors: list[BaseException] = []

    async def load(self, sent: str = IMAGE) -> None:
        media_budget.set(self.budget)  # in a task of its own, as each handler's is
        try:
            self.images.append(await connector().fetch_image_async(sent))
        except Exception as error:
            self.errors.append(error)

    def end(self) -> None:
        self.images.clear()
        gc.collect()
        self.budget.room.leave(self.budget)


@contextlib.asynccontextmanager
async def running(*work: Any) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@on_loop
async def test_what_is_decoded_makes_room_when_it_is_dropped() -> None:
    room = MediaRoom(3 * MIB)
    first, second = Request(room), Request(room)
    await asyncio.gather(*(asyncio.create_task(first.load()) for _ in range(3)))
    assert room.held == 3 * MIB
    # Somebody who waits already may have all, so that these two are behind him.
    other = Request(room)
    async with running(other.load()) as (ahead,):
        await ahead
        async with running(second.load(), second.load()) as waiting:
            await soon(lambda: len(room._waiting) == 2)
            assert not second.images
            first.end()
            await asyncio.gather(*waiting)
            assert len(second.images) == 2 and not second.errors
    second.end()
    other.end()
    await soon(lambda: room.held == 0)


@on_loop
async def test_requests_that_hold_some_and_want_more_do_not_wait_for_each_other() -> None:
    room = MediaRoom(4 * MIB)
    one, two = Request(room), Request(room)
    for request in (one, two):
        await asyncio.gather(*(asyncio.create_task(request.load()) for _ in range(2)))
    async with running(one.load(), two.load(), one.load(), two.load()) as tasks:
        await soon(lambda: 4 in (len(one.images), len(two.images)))
        if len(two.images) == 4:
            one, two = two, one
        assert len(two.images) == 2, "one at a time may have more than there is"
        assert room.held == 6 * MIB
        one.end()
        await asyncio.gather(*tasks)
    assert len(two.images) == 4 and not one.errors and not two.errors
    assert room.held == 4 * MIB


@on_loop
async def test_a_crowd_has_no_more_at_a_time_than_there_is_and_one_request() -> None:
    room, most = MediaRoom(8 * MIB), 0
    crowd = [Request(room) for _ in range(30)]

    async def run(request: Request) -> None:
        nonlocal most
        await asyncio.gather(*(asyncio.create_task(request.load()) for _ in range(4)))
        most = max(most, room.held)
        request.end()

    await asyncio.gather(*map(run, crowd))
    assert not any(request.errors for request in crowd)
    assert most <= (8 + 4) * MIB and room.held == 0


@on_loop
async def test_who_has_waited_for_long_is_told_to_come_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media_budgets, "PATIENCE", 0.2)
    before = REFUSALS.labels("media_budget")._value.get()
    room = MediaRoom(MIB)
    holding, ahead, late = (Request(room) for _ in range(3))
    for request in (holding, ahead, late):
        await asyncio.create_task(request.load())
    (error,) = late.errors
    assert isinstance(error, GracefulHTTPError) and error.http_status == 503
    assert "too many images" in str(error) and not ahead.errors
    assert REFUSALS.labels("media_budget")._value.get() == before + 1
    for request in (holding, ahead):
        request.end()
    await asyncio.create_task(late.load())
    assert late.images, "and finds room then"
    assert late.budget.held == MIB


@on_loop
async def test_what_could_not_be_decoded_holds_nothing() -> None:
    room = MediaRoom(4 * MIB)
    broken = Request(room, still=3 * MIB)
    data = image(size=(512, 500))
    await asyncio.create_task(broken.load(url("image/png", data[: len(data) // 2])))
    await asyncio.create_task(broken.load(url("image/png", image(size=(1024, 1024)))))
    assert [type(error).__name__ for error in broken.errors] == ["ValueError"] * 2
    assert room.held == broken.budget.held == 0
    left = Request(room)
    async with running(*(left.load() for _ in range(9))):
        await soon(lambda: len(left.images) > 3)
    left.end()
    await soon(lambda: room.held == 0)


@on_loop
async def test_a_sound_holds_what_it_may_become_and_then_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_BYTES", str(8 * MIB))
    room, seen = MediaRoom(10 * MIB), []

    class Sound(AudioMediaIO):
        def load_bytes(self, data: bytes) -> Any:
            seen.append(room.held)
            return np.zeros(16_000, np.float32), 16_000.0

    media_budget.set(MediaBudget(room=room))
    loaded = await connector().load_from_url_async(url("audio/wav", b"sound"), Sound())
    assert seen == [8 * MIB] and room.held == loaded[0].nbytes == 4 * 16_000
    del loaded
    await soon(lambda: not room.held)  # what has woken this task holds it for a moment


@on_loop
async def test_frames_of_a_video_that_are_images_wait_together() -> None:
    room = MediaRoom(3 * MIB)
    holding = Request(room)
    await asyncio.create_task(holding.load())
    await asyncio.create_task(holding.load())
    frames = url("video/jpeg", *(image("JPEG") for _ in range(3)))
    media_budget.set(MediaBudget(room=room))
    loaded = await connector().fetch_video_async(frames)
    number, held = len(loaded[0]), room.held
    holding.end()
    del loaded
    assert (number, held) == (3, 5 * MIB)
    await soon(lambda: not room.held)  # what has woken this task holds it for a moment
