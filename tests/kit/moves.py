"""Requests that change their instance while they run, and all that their clients get of them."""

import contextlib
import itertools
import json
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.kit.node import Node, descendants
from tests.kit.wait import eventually

# What differs between any two runs of the same request.
_OF_ONE_RUN = {"id", "created", "system_fingerprint", "service_tier", "request_id"}
# Strings of which a stream brings a further piece each time; of all others the last counts.
_PIECES = {"text", "content", "reasoning", "reasoning_content", "arguments", "name"}

_EVERY = 0.005  # seconds between looks at where a request is


class Run(threading.Thread):
    """One client's request, read to its end beside the test."""

    def __init__(self, node: Node, path: str, body: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self.node, self.path = node, path
        self.mark = uuid.uuid4().hex[:16]  # a part of its id, and of those of its choices
        self.body = {"model": "small", "cache_salt": self.mark, "request_id": self.mark} | body
        self.answer: dict[str, Any] = {}
        self.broken: Exception | None = None
        self._left = threading.Event()

    def begin(self) -> "Run":
        self.start()
        return self

    def run(self) -> None:
        try:
            if self.body.get("stream"):
                with self.node.stream(self.path, self.body, within=120.0) as events:
                    got = list(itertools.takewhile(lambda _: not self._left.is_set(), events))
                    self.answer = fold(got)
                    assert events.done or self._left.is_set(), "the stream broke off"
            else:
                answer = self.node.post(self.path, self.body, within=120.0)
                self.answer = fold([answer.json])
        except Exception as error:
            self.broken = error

    def end(self, within: float = 120.0) -> dict[str, Any]:
        """What the client got, once it has it all."""
        self.join(within)
        assert not self.is_alive(), "the request hangs"
        assert self.broken is None, self.broken
        assert "error" not in self.answer, self.answer["error"]
        return self.answer

    def hang_up(self) -> None:
        """Go away at the next event of a stream."""
        self._left.set()
        self.join(30.0)

    # ---- where it is ----

    def requests(self) -> list[dict[str, Any]]:
        """What the cluster lists of it: a request for each choice that has not ended."""
        listed = self.node.get("/llumnix/requests").json
        return sorted((r for r in listed if self.mark in r["id"]), key=lambda r: str(r["id"]))

    def reach(self, position: int, count: int = 1) -> list[dict[str, Any]]:
        """Wait until each of its `count` requests has generated so many tokens."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = self.requests()
            if not self.is_alive():
                raise AssertionError(f"it ended before position {position}: {self.answer}")
            return len(found) == count and all(r["generated"] >= position for r in found)

        eventually(there, within=60.0, every=_EVERY)
        return found

    def move(self, position: int, choices: Sequence[int] = (0,), of: int = 1) -> list[Any]:
        """Move requests to the other instance, each from that position on; what came of it."""
        found = self.reach(position, of)
        return [move(self.node, found[n]) for n in choices]


def move(node: Node, request: Mapping[str, Any], to: str = "") -> Any:
    """Move a listed request, to the node's other instance if none is named."""
    others = [i for i in node.instances() if i != request["instance"]]
    body = {"request": request["id"], "to": to or others[0]}
    answer = node.post("/llumnix/migrate", body, within=60.0)
    assert answer.status == 200, f"{answer.text} (at {request})"
    return answer.json


def whole_text(answer: dict[str, Any]) -> str:
    """The text of an answer of one choice, which has all the tokens that were asked for."""
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    text: str = choice["text"]
    return text


def engine_of(node: Node, instance: str, what: str = "EngineCore") -> int:
    """The process of an instance's engine core, or of its Worker."""
    for pid in sorted(descendants(node.pid)):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            log = Path(os.readlink(f"/proc/{pid}/fd/1")).name
            if what in title and log == f"{instance}.log":
                return pid
    raise AssertionError(f"{instance} has no {what}")


def fold(events: Sequence[Any]) -> dict[str, Any]:
    """A whole answer, or the chunks of a streamed one, in one shape."""
    whole: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if not isinstance(event, dict):
            raise AssertionError(f"no answer: {event!r}")
        rest = {k: v for k, v in event.items() if k not in _OF_ONE_RUN and k != "object"}
        for choice in rest.pop("choices", ()):
            into = choices.setdefault(choice["index"], {})
            flat = {k: v for k, v in choice.items() if k not in ("delta", "message")}
            _merge(into, flat | (choice.get("delta") or choice.get("message") or {}))
        _merge(whole, rest)
    return whole | {"choices": [choices[n] for n in sorted(choices)]}


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        old = into.get(key)
        if value is None or key in _OF_ONE_RUN:
            continue
        if key == "tool_calls":
            calls = into.setdefault(key, {})
            for n, call in enumerate(value):
                _merge(calls.setdefault(call.get("index", n), {}), call)
        elif isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        elif isinstance(value, list):
            into[key] = [*(old or ()), *value]
        elif isinstance(value, str) and key in _PIECES:
            into[key] = (old or "") + value
        else:
            into[key] = value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two answers differ; logprobs may in their last digits, which hang on the batch."""
    if isinstance(one, float) and isinstance(other, float):
        return [] if abs(one - other) <= 2e-3 * max(1.0, abs(one)) else [f"{where}: {one} {other}"]
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other}, key=str)
        found = [differences(one.get(k), other.get(k), f"{where}.{k}") for k in keys]
        return [line for lines in found for line in lines]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = [
            differences(a, b, f"{where}[{n}]")
            for n, (a, b) in enumerate(zip(one, other, strict=True))
        ]
        return [line for lines in found for line in lines]
    return [] if one == other else [f"{where}: {_short(one)} is not {_short(other)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 400 else f"{text[:400]}…"
