"""Clients that stream requests from all nodes, and someone who moves requests about."""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.judge import Verdict, right_answer

TRIES = 60  # times that a request is refused before it counts as failed
SILENCE = 90.0  # seconds without a token after which a client gives up: a hang
AGAIN = 0.5  # seconds until a refused request is sent to another node


@dataclass(eq=False)
class Request:
    """A request of a client, from its start to its end; times are seconds since the epoch."""

    node: str
    began: float
    verdict: Verdict
    id: str = ""
    times: list[float] = field(default_factory=list)  # of each event with tokens
    ended: float = 0.0
    finish: str = ""
    refusals: int = 0
    failure: str = ""  # why it ended early; empty if it did not
    judged: bool = False  # it is in the books of a fault
    broken: bool = False  # its connection broke, as it does if its node dies

    def gaps(self, begin: float, end: float) -> list[tuple[float, float]]:
        """The silences between two events of it that overlap this time."""
        times = [*self.times, self.ended or time.time()]  # a copy: the load's thread adds to them
        return [(a, b) for a, b in pairwise(times) if b > begin and a < end]


class Load:
    """`clients` requests at any time, on a loop in a thread of its own."""

    def __init__(
        self, nodes: Mapping[str, str], model: Path, clients: int, seed: int, moves: float
    ) -> None:
        self._urls = dict(nodes)
        config = json.loads((model / "config.json").read_text())
        self._vocabulary, self._end = int(config["vocab_size"]), int(config["eos_token_id"])
        self._clients = clients
        self._draw = random.Random(seed)
        self._moves = moves  # seconds between two moves by hand; 0: none
        self.avoid: frozenset[str] = frozenset()  # nodes that a balancer would not choose
        self.open: set[Request] = set()
        self.ended: list[Request] = []
        self.moved: Counter[str] = Counter()
        self.bugs: list[str] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="load", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, within: float) -> bool:
        """Send nothing new, and wait for what runs; whether it has ended in time."""
        self._stopping.set()
        self._thread.join(within)
        return not self._thread.is_alive()

    def homes(self, node: str) -> int:
        """How many open requests have their API server on a node."""
        return sum(request.node == node for request in list(self.open))

    def since(self, begin: float) -> list[Request]:
        """All requests that were under way at that time or later."""
        return [r for r in [*self.ended, *list(self.open)] if not r.ended or r.ended >= begin]

    def _main(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=SILENCE)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            workers = [self._client(session, number) for number in range(self._clients)]
            mover = asyncio.create_task(self._mover(session))
            await asyncio.gather(*workers)
            mover.cancel()
            await asyncio.gather(mover, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(self._draw.random())
        await asyncio.sleep(number * 0.2)
        while not self._stopping.is_set():
            prompt = [draw.randrange(3, self._vocabulary) for _ in range(draw.randrange(4, 200))]
            length = draw.randrange(100, 400)
            right = right_answer(prompt, length, self._vocabulary, self._end)
            request = Request("", time.time(), Verdict(right))
            self.open.add(request)
            try:
                await self._ask(session, request, prompt, draw)
            except Exception as error:
                self.bugs.append(f"the client failed: {error!r}")
                request.failure = repr(error)
            request.ended = time.time()
            self.open.discard(request)
            self.ended.append(request)

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        request: Request,
        prompt: list[int],
        draw: random.Random,
    ) -> None:
        """Send a request until a node takes it, and read its answer."""
        body = {"model": "small", "prompt": prompt, "max_tokens": len(request.verdict.right)}
        body |= {"stream": True, "return_token_ids": True, "ignore_eos": True, "temperature": 0}
        for _ in range(TRIES):
            choice = [n for n in sorted(self._urls) if n not in self.avoid] or sorted(self._urls)
            request.node = draw.choice(choice)
            try:
                url = f"{self._urls[request.node]}/v1/completions"
                async with session.post(url, json=body) as answer:
                    if answer.status == 200:
                        await self._read(answer, request)
                        return
                    if answer.status not in (429, 503):
                        request.failure = f"status {answer.status}: {(await answer.text())[:300]}"
                        return
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                if request.times:
                    request.broken = True
                    request.failure = f"broken off: {type(error).__name__}: {error}"
                    return
            request.refusals += 1
            await asyncio.sleep(AGAIN)
        request.failure = f"refused {request.refusals} times"

    async def _read(self, answer: aiohttp.ClientResponse, request: Request) -> None:
        done = False
        async for line in answer.content:
            data = line.removeprefix(b"data:").strip()
            if line[:5] != b"data:" or not data:
                continue
            if data == b"[DONE]":
                done = True
                break
            event = json.loads(data)
            if "error" in event:
                request.failure = str(event["error"].get("message", event["error"]))
                return
            self._take(request, event)
        if not done:
            request.broken, request.failure = True, "broken off without an end"
        elif request.finish != "length":
            request.failure = f"finished by {request.finish!r}"
        else:
            request.verdict.end()

    def _take(self, request: Request, event: Any) -> None:
        request.id = event["id"]
        for choice in event["choices"]:
            if tokens := choice.get("token_ids"):
                request.times.append(time.time())
                request.verdict.take(tokens)
            request.finish = choice.get("finish_reason") or request.finish

    async def _mover(self, session: aiohttp.ClientSession) -> None:
        """Move requests by hand, one after the other, as long as the clients ask."""
        if not self._moves:
            return
        draw = random.Random(self._draw.random())
        while True:
            await asyncio.sleep(self._moves * draw.uniform(0.5, 1.5))
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, IndexError):
                async with asyncio.timeout(15.0):
                    self.moved[await self._move(session, draw)] += 1

    async def _move(self, session: aiohttp.ClientSession, draw: random.Random) -> str:
        url = self._urls[draw.choice(sorted(set(self._urls) - self.avoid) or sorted(self._urls))]
        async with session.get(f"{url}/llumnix/requests") as answer:
            found = draw.choice(await answer.json())
        async with session.get(f"{url}/status") as answer:
            instances = [i["id"] for i in (await answer.json())["instances"]]
        to = draw.choice([i for i in instances if i != found["instance"]])
        body = {"request": found["id"], "to": to}
        async with session.post(f"{url}/llumnix/migrate", json=body) as answer:
            return "moved" if answer.status == 200 else f"status {answer.status}"
