"""Requests whose clients have left, as far as vLLM's frontend knows of them."""

from types import SimpleNamespace
from typing import Any

from llumnix.server.frontend import Frontend


class Client:
    """What is open, and what was ended."""

    def __init__(self, *names: str) -> None:
        self.ledger = set(names)
        self.ended: list[str] = []

    def end(self, request_ids: list[str]) -> None:
        self.ended += request_ids
        self.ledger -= set(request_ids)


class Processor:
    """vLLM's books of requests."""

    def __init__(self, *names: str) -> None:
        self.request_states = dict.fromkeys(names)

    def abort_requests(self, request_ids: list[str], internal: bool) -> None:
        for request_id in request_ids:
            self.request_states.pop(request_id, None)


def test_what_was_stopped_at_once_is_cleared_up_when_its_handler_ends() -> None:
    """A middleware may have dropped the generator of tokens, which would have done it."""
    client, processor = Client("r1", "r2"), Processor("r1", "r2", "other")
    frontend: Any = object.__new__(Frontend)
    frontend._client, frontend.llm = client, SimpleNamespace(output_processor=processor)
    frontend.stop(["r1", "r2"])
    assert client.ended == ["r1", "r2"] and len(processor.request_states) == 3
    frontend.end(["r1", "r2"])
    assert list(processor.request_states) == ["other"]
    frontend.end(["r1", "r2"])  # which have ended
    assert len(client.ended) == 4
