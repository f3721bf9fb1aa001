"""Answers of `/v1/responses` that outlive their request, which vLLM keeps for ever in plain dicts.

It has neither a limit for them nor a hook, so its dicts are replaced by mappings that tell when
something is put in. vLLM has had them under these names, as dicts, in all supported versions.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

from llumnix.engine.vllm.compat import failed

RESPONSES = 1000
TOTAL_BYTES = 256 * 2**20
# What Python makes of them, roughly.
LEAST_BYTES = 16 * 1024  # of a response, its messages and events, however small
TOKEN_BYTES = 64  # of an output
LOGPROB_BYTES = 512  # of a token's logprobs, each
EVENT_BYTES = 2 * 1024

Task = asyncio.Task[Any]


@dataclass(frozen=True)
class Handler:
    """What the server knows of the request that it is handling, in the task that calls."""

    body_bytes: Callable[[], int]  # roughly what its body is in memory
    leave_behind: Callable[[Task], None]  # the request goes on until that task has ended
    at_end: Callable[[Callable[[], None]], None]  # call that when the request has ended


@dataclass(slots=True, eq=False)
class _Stored:
    """What is known of one response."""

    size: int = 0  # bytes
    messages: int = 0  # bytes of it that those which follow it in a conversation hold as well
    running: int = 0  # a response that has not ended is never dropped
    follower: str = ""  # the latest response that follows it


class _Kept(dict[str, Any]):
    """One of vLLM's dicts."""

    def __init__(self, on_put: Callable[[str], None]) -> None:
        super().__init__()
        self._on_put = on_put

    def __setitem__(self, response_id: str, value: Any) -> None:
        super().__setitem__(response_id, value)
        self._on_put(response_id)


class StoredResponses:
    """Everything that vLLM keeps of responses, within limits: the oldest that have ended go first.

    Of a response that goes nothing is left: its text, its messages and its events go together.
    """

    def __init__(
        self, handler: Handler, most: int = RESPONSES, most_bytes: int = TOTAL_BYTES
    ) -> None:
        """`most` responses of `most_bytes` together; those that still run count as well."""
        self._handler = handler
        self._most = most
        self._most_bytes = most_bytes
        self._stored: dict[str, _Stored] = {}  # the oldest first
        self.responses: dict[str, Any] = _Kept(self._put)
        self.messages: dict[str, Any] = _Kept(self._put)
        self.events: dict[str, tuple[Sequence[Any], asyncio.Event]] = _Kept(self._put)
        self.tasks: dict[str, Task] = _Kept(self._goes_on)
        self.total_bytes = 0

    def stream(
        self, response_id: str, starting_after: int | None = None
    ) -> AsyncGenerator[Any, None]:
        """The events of an answer in the background after that one, up to the last that comes.

        vLLM's own waits for ever where the answer was cancelled, has failed, or has no more events.
        """
        if starting_after is not None and starting_after < 0:
            raise failed("starting_after must be at least 0", HTTPStatus.BAD_REQUEST)
        return self._stream(response_id, 0 if starting_after is None else starting_after + 1)

    async def _stream(self, response_id: str, place: int) -> AsyncGenerator[Any, None]:
        if response_id not in self.events:
            text = f"no events of the response {response_id} are kept"
            raise failed(text, HTTPStatus.BAD_REQUEST)
        events, more = self.events[response_id]
        task = self.tasks.get(response_id)
        while True:
            more.clear()
            while place < len(events):
                yield events[place]
                place += 1
            if task is None or task.done():
                return
            await more.wait()  # vLLM sets it with each event, and when its task ends

    def _put(self, response_id: str) -> None:
        """Something of a response is stored, by its handler or by its task in the background."""
        stored = self._stored.get(response_id)
        if stored is None:
            stored = self._stored[response_id] = _Stored()
            self._resize(stored, LEAST_BYTES)
        more = self._handler.body_bytes() - stored.messages
        if more > 0:  # the first time, or if another request has chosen the same id
            stored.messages += more
            self._resize(stored, stored.size + more)
        stored.running += 1
        self._handler.at_end(partial(self._ended, response_id, stored))

    def _goes_on(self, response_id: str) -> None:
        self._handler.leave_behind(self.tasks[response_id])

    def _ended(self, response_id: str, stored: _Stored) -> None:
        """The request has ended, its answer in the background too, or has been given up."""
        stored.running -= 1
        if stored.running or self._stored.get(response_id) is not stored:
            return
        response = self.responses.get(response_id)
        if response is None:  # nobody can ask for it
            self._drop(response_id)
            return
        if response.status in ("queued", "in_progress"):  # which it would be for ever
            response.status = "failed"
        previous = self._stored.get(response.previous_response_id or "")
        if previous is not None and previous is not stored:
            previous.follower = response_id
        self._resize(stored, stored.size + self._output_bytes(response_id, response))
        if self._full:
            for one in [i for i, s in self._stored.items() if not s.running]:
                self._drop(one)
                if not self._full:
                    break

    @property
    def _full(self) -> bool:
        return len(self._stored) > self._most or self.total_bytes > self._most_bytes

    def _output_bytes(self, response_id: str, response: Any) -> int:
        tokens = 0 if response.usage is None else response.usage.output_tokens
        logprobs = 0 if response.top_logprobs is None else 1 + response.top_logprobs
        size = tokens * (TOKEN_BYTES + LOGPROB_BYTES * logprobs)
        if (kept := self.events.get(response_id)) is None:
            return int(size)
        return int(2 * size + EVENT_BYTES * len(kept[0]))  # all of it is in its last event, too

    def _drop(self, response_id: str) -> None:
        stored = self._stored.pop(response_id)
        self.total_bytes -= stored.size
        for kept in (self.responses, self.messages, self.events):
            kept.pop(response_id, None)
        if (follower := self._stored.get(stored.follower)) is not None:
            follower.messages += stored.messages
            self._resize(follower, follower.size + stored.messages)

    def _resize(self, stored: _Stored, size: int) -> None:
        self.total_bytes += size - stored.size
        stored.size = size


def bound_stored_responses(state: Any, handler: Handler) -> None:
    """Bound what vLLM's application, whose state this is, keeps of responses.

    It keeps none unless VLLM_ENABLE_RESPONSES_API_STORE says so. Raises ImportError if this version
    keeps them elsewhere.
    """
    serving = getattr(state, "openai_serving_responses", None)
    if serving is None or not getattr(serving, "enable_store", True):
        return
    stored = StoredResponses(handler)
    for name, mapping in (
        ("response_store", stored.responses),
        ("msg_store", stored.messages),
        ("event_store", stored.events),
        ("background_tasks", stored.tasks),
    ):
        if getattr(serving, name, None) != {}:
            raise ImportError(f"vLLM keeps the {name} of its responses elsewhere")
        setattr(serving, name, mapping)
    if not hasattr(serving, "responses_background_stream_generator"):
        raise ImportError("vLLM streams its answers in the background elsewhere")
    serving.responses_background_stream_generator = stored.stream
