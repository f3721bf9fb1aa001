"""What a handler's requests count against the limits, one after the other."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from llumnix.server.admission import Admission
from llumnix.server.spans import leave_behind
from tests.kit.loop import on_loop
from tests.kit.requests import core_request


@contextmanager
def handler(admission: Admission, tokens: int = 7) -> Iterator[None]:
    with admission._taken(tokens):
        yield
    assert (admission.requests, admission.prompt_tokens) == (0, 0)


def counted(admission: Admission) -> tuple[int, int]:
    return admission.requests, admission.prompt_tokens


def test_choices_count_together() -> None:
    admission = Admission(9, 99)
    with handler(admission):
        assert counted(admission) == (1, 7), "a guess, before it is tokenised"
        for n in range(3):
            admission.enter(core_request(f"r{n}", [1] * 10))
        assert counted(admission) == (3, 30)


def test_steps_of_a_beam_search_count_one_after_the_other() -> None:
    admission = Admission(9, 99)
    with handler(admission):
        for step in range(40):
            beams = [f"{step}-{beam}" for beam in range(4)]
            for beam in beams:
                admission.enter(core_request(beam, [1] * (10 + step)))
            assert counted(admission) == (4, 4 * (10 + step))
            for beam in beams:
                admission.leave(beam)
            assert counted(admission) == (1, 10 + step), "its handler is still there"
    assert not admission._open


def test_what_ends_after_its_handler_counts_no_more() -> None:
    admission = Admission(9, 99)
    with handler(admission):
        admission.enter(core_request("r1", [1] * 10))
    admission.leave("r1")
    admission.leave("of nobody")
    assert counted(admission) == (0, 0) and not admission._open


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/api/v1/completions", "/v1/models", "/v1/messages/count_tokens"),
        *("/v1/completions/render", "/v1/chat/completions/derender"),
    ],
)
@on_loop
async def test_which_routes_are_limited(path: str) -> None:
    admission = Admission(1, 0, "/api/")
    admission.requests = 1

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=200)

    response = await admission.guard(answer)(make_mocked_request("POST", path))
    assert response.status == (200 if path == "/v1/models" else 429)


@on_loop
async def test_an_answer_in_the_background_that_begins_too_late_does_not_begin() -> None:
    """Its handler has been cancelled, but not the task of vLLM's in which it was."""
    admission = Admission(9, 99)
    over = asyncio.Event()

    async def orphan() -> "asyncio.Task[bool]":
        await over.wait()
        task = asyncio.create_task(asyncio.Event().wait())
        leave_behind(task)
        return task

    with handler(admission):
        late = asyncio.create_task(orphan())
    over.set()
    task = await late
    async with asyncio.timeout(10):
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled() and counted(admission) == (0, 0)


@on_loop
async def test_an_answer_in_the_background_counts_until_it_ends() -> None:
    admission = Admission(9, 99)

    async def answer(name: str, go: asyncio.Event) -> None:
        for step in range(2):  # as with a tool, whose outcome the model is told
            await go.wait()
            admission.enter(core_request(f"{name}{step}", [1] * 10))
            admission.leave(f"{name}{step}")
            go.clear()

    for way in ("ends", "is cancelled", "is cancelled before it begins"):
        with admission._taken(7):
            go = asyncio.Event()
            task = asyncio.create_task(answer("r", go))
            leave_behind(task)
        assert counted(admission) == (1, 7), "its handler has ended"
        with admission._taken(7):
            assert counted(admission) == (2, 14)
        if "before" not in way:
            go.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert counted(admission) == (1, 10), "it may ask an engine once more"
        if way == "ends":
            go.set()
        else:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert counted(admission) == (0, 0) and not admission._open, way
