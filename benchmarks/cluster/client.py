"""One process of the load: `python -m benchmarks.cluster.client`, as `load.Clients` starts it.

For each line on standard input, a plan in JSON, it makes all request bodies, answers `ready`,
reads the start (in seconds of the machine's monotonic clock, which all processes share), sends each
request at its time whatever became of those before, and answers with one line of rows.
"""

import asyncio
import random
import sys
import time
from typing import Any

import aiohttp
import orjson
import uvloop

TOKENS = range(1000, 30_000)  # that prompts are made of; nothing of them is in a prefix cache
_HEADERS = {"Content-Type": "application/json"}


class Stream:
    """What a client sees of one request; times in seconds from when it was to be sent."""

    def __init__(self, number: int, due: float, wanted: int) -> None:
        self._number, self._due, self._wanted = number, due, wanted
        self._late = self._first = self._last = self._gap = 0.0
        self._events = self._tokens = 0
        self.error = ""

    def sent(self) -> None:
        """It goes out now."""
        self._late = time.monotonic() - self._due

    def take(self, chunk: bytes) -> None:
        """Some of the answer came."""
        events = chunk.count(b"data: {")
        if not events or (b'"choices":[]' in chunk and events == 1):
            return  # the end, or the usage alone
        now = time.monotonic() - self._due
        if self._events:
            self._gap = max(self._gap, now - self._last)
        else:
            self._first = now
        self._last = now
        self._events += events

    def ended(self, tail: bytes) -> None:
        """All of the answer came; `tail` is its end."""
        place = tail.rfind(b'"completion_tokens":')
        if place >= 0:
            self._tokens = int(tail[place + 20 :].split(b",")[0].split(b"}")[0])
        if b"[DONE]" not in tail or b'"error"' in tail:
            self.error = f"cut: {tail[-160:].decode(errors='replace')}"
        elif self._tokens != self._wanted:
            self.error = f"{self._tokens} tokens and not {self._wanted}"

    def row(self) -> list[Any]:
        """For the parent: number, late, first, last, longest gap, events, error."""
        times = (self._late, self._first, self._last, self._gap)
        return [self._number, *(round(t, 5) for t in times), self._events, self.error]


def body(model: str, seed: int, number: int, prompt: int, output: int) -> bytes:
    """A completion of random tokens, the same for each system."""
    tokens = random.Random(seed * 1_000_003 + number).choices(TOKENS, k=prompt)
    return orjson.dumps(
        {
            "model": model,
            "prompt": tokens,
            "max_tokens": output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


async def _send(session: aiohttp.ClientSession, url: str, data: bytes, stream: Stream) -> None:
    tail = b""
    try:
        stream.sent()
        async with session.post(url, data=data, headers=_HEADERS) as response:
            if response.status != 200:
                text = await response.text()
                stream.error = f"{response.status} {text[:160]}"
                return
            async for chunk in response.content.iter_any():
                stream.take(chunk)
                tail = (tail + chunk)[-600:]
        stream.ended(tail)
    except (aiohttp.ClientError, OSError) as error:
        stream.error = f"{type(error).__name__}: {error}"[:160]
    except asyncio.CancelledError:
        stream.error = "unfinished"


async def run(plan: dict[str, Any], bodies: list[bytes], start: float) -> list[list[Any]]:
    """Send everything, and drop what is still open at the end of the plan's time."""
    tasks: list[asyncio.Task[None]] = []
    streams: list[Stream] = []
    # Each request has a connection of its own: a kept one may be closed just when it is used.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=1 << 20
    ) as session:
        for (number, at, _, output), data in zip(plan["requests"], bodies, strict=True):
            await asyncio.sleep(max(start + at - time.monotonic(), 0.0))
            streams.append(Stream(number, start + at, output))
            tasks.append(asyncio.create_task(_send(session, plan["url"], data, streams[-1])))
        left = max(start + plan["until"] - time.monotonic(), 0.0)
        _, late = await asyncio.wait(tasks, timeout=left) if tasks else (set(), set())
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    return [stream.row() for stream in streams]


def main() -> None:
    """Plan after plan, until standard input ends."""
    for line in sys.stdin.buffer:
        plan = orjson.loads(line)
        bodies = [body(plan["model"], plan["seed"], n, a, b) for n, _, a, b in plan["requests"]]
        print("ready", flush=True)
        start = float(sys.stdin.buffer.readline())
        rows = uvloop.run(run(plan, bodies, start))
        sys.stdout.buffer.write(orjson.dumps(rows) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
