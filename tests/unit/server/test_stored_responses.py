"""vLLM's stored responses: how many there may be, and which go first."""

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from llumnix.engine.vllm.compat import client_errors
from llumnix.engine.vllm.frontend.stored_responses import (
    StoredResponses,
    bound_stored_responses,
)
from llumnix.server.spans import until_over
from llumnix.server.stored import HANDLER, of_body
from tests.kit.loop import on_loop

KB = 1024


class Serving:
    """vLLM's, as far as it stores something."""

    def __init__(self, **limits: int) -> None:
        self.stored = StoredResponses(HANDLER, **limits)

    def answer(
        self, name: str, size: int = 0, previous: str | None = None, status: str = "completed"
    ) -> None:
        """A whole request, with a body of that size."""
        with until_over(lambda: None), of_body(b"x" * size):
            self.stored.messages[name] = ["Hi"]
            self.stored.responses[name] = response(status, previous)

    def start(self, name: str, task: "asyncio.Task[None]") -> None:
        """A request for an answer in the background, up to its own answer."""
        with until_over(lambda: None):
            self.stored.messages[name] = ["Hi"]
            self.stored.responses[name] = response("queued")
            self.stored.tasks[name] = task
            task.add_done_callback(lambda _: self.stored.tasks.pop(name, None))

    @property
    def names(self) -> list[str]:
        names = list(self.stored.responses)
        assert set(self.stored.messages) <= set(names) >= set(self.stored.events)
        return names


def response(status: str, previous: str | None = None, tokens: int = 1) -> Any:
    usage = SimpleNamespace(output_tokens=tokens)
    return SimpleNamespace(
        status=status, usage=usage, top_logprobs=None, previous_response_id=previous
    )


def test_the_oldest_go_when_there_are_too_many() -> None:
    serving = Serving(most=3)
    for turn in range(9):
        serving.answer(f"r{turn}")
    assert serving.names == ["r6", "r7", "r8"]


def test_the_oldest_go_when_they_are_too_large() -> None:
    serving = Serving(most_bytes=1000 * KB)
    for turn in range(9):
        serving.answer(f"r{turn}", 100 * KB)
    assert serving.names == ["r5", "r6", "r7", "r8"], "characters count twice"
    serving.answer("small")
    assert serving.names[-2:] == ["r8", "small"]
    serving.answer("huge", 600 * KB)
    assert serving.names == [] and serving.stored.total_bytes == 0


def test_an_id_that_is_used_again_has_the_size_of_the_larger() -> None:
    serving = Serving(most_bytes=1000 * KB)
    for turn in range(9):
        serving.answer(f"r{turn}")
        serving.answer(f"r{turn}", 100 * KB)
    assert serving.names == ["r5", "r6", "r7", "r8"]


def test_what_was_given_up_leaves_nothing() -> None:
    serving = Serving()
    with pytest.raises(asyncio.CancelledError), until_over(lambda: None):
        serving.stored.messages["r1"] = ["Hi"]
        raise asyncio.CancelledError
    assert not serving.stored.messages and serving.stored.total_bytes == 0


def test_messages_live_on_in_what_follows_them() -> None:
    serving = Serving(most=3, most_bytes=1000 * KB)
    serving.answer("r0", 100 * KB)
    for turn in range(1, 5):
        serving.answer(f"r{turn}", 100 * KB, previous=f"r{turn - 1}")
    assert serving.names == [], "the last holds the messages of all"


@on_loop
async def test_an_answer_in_the_background_stays_while_it_runs() -> None:
    serving = Serving(most=2)
    go = asyncio.Event()

    async def answer() -> None:
        serving.stored.events["slow"] = deque([1]), asyncio.Event()
        await go.wait()
        raise RuntimeError("an engine has failed")

    with until_over(lambda: None):
        task = asyncio.create_task(answer())
        serving.start("slow", task)
    await asyncio.sleep(0)
    for turn in range(4):
        serving.answer(f"r{turn}")
    assert serving.names == ["slow", "r3"]
    go.set()
    await asyncio.gather(task, return_exceptions=True)
    assert serving.names == ["slow", "r3"]
    assert serving.stored.responses["slow"].status == "failed", "not queued for ever"
    serving.answer("r4")
    assert serving.names == ["r3", "r4"]
    assert not serving.stored.events and not serving.stored.tasks


@on_loop
async def test_a_stream_of_what_is_over_ends() -> None:
    """vLLM's waits for an event that is the response's last, which may not come."""
    serving = Serving()
    go = asyncio.Semaphore(0)

    async def answer() -> None:
        events: deque[int] = deque()
        more = asyncio.Event()
        serving.stored.events["r"] = events, more
        try:
            for event in range(5):
                await go.acquire()
                events.append(event)
                more.set()
            await asyncio.Event().wait()
        finally:
            more.set()

    async def read(starting_after: int | None = None) -> list[int]:
        return [event async for event in serving.stored.stream("r", starting_after)]

    with until_over(lambda: None):
        task = asyncio.create_task(answer())
        serving.start("r", task)
    await asyncio.sleep(0)
    starts = (None, 0, 3, 4, 70)
    readers = [asyncio.create_task(read(start)) for start in starts]
    for _ in range(5):
        go.release()
        await asyncio.sleep(0)
    task.cancel()
    parts = [[0, 1, 2, 3, 4], [1, 2, 3, 4], [4], [], []]
    async with asyncio.timeout(10):
        assert await asyncio.gather(*readers) == parts, "it has been cancelled"
        assert [await read(start) for start in starts] == parts, "it is over"


@on_loop
async def test_a_stream_of_what_is_not_there_is_refused() -> None:
    serving = Serving()
    with pytest.raises(client_errors(), match="at least 0"):
        serving.stored.stream("r", -1)
    with pytest.raises(client_errors(), match="no events"):
        await anext(serving.stored.stream("r"))


def test_a_version_that_stores_elsewhere_is_refused() -> None:
    state = SimpleNamespace(openai_serving_responses=SimpleNamespace(response_store={}))
    with pytest.raises(ImportError, match="msg_store"):
        bound_stored_responses(state, HANDLER)
    bound_stored_responses(SimpleNamespace(openai_serving_responses=None), HANDLER)
