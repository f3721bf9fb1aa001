"""Clients that nobody would invite: they leave in the middle, or send what has to be refused."""

import contextlib
import errno
import functools
import gzip
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tests.kit.leaving import SMALL, WAYS, Client, head, post

PAUSE = 0.5  # seconds between two things that one of them does, on average
COUNT = 2  # of them
STAYS = 1.5  # seconds that one stays which leaves, at most
PATIENCE = 10.0  # seconds for an answer; a node that is stopped gives none
PATH = "/v1/completions"
# What a node may answer that is itself in trouble, or has no instance.
UNAVAILABLE = (429, 503)


def _completion(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": [5, 6, 7], "max_tokens": 4} | more


def _nested(levels: int) -> bytes:
    return b'{"model": "small", "prompt": "x", "a": ' + b"[" * levels + b"]" * levels + b"}"


def _schema(properties: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"p{n}": {"type": "string"} for n in range(properties)},
    }


@functools.cache
def _bodies() -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """Each to be refused with a status of 400 to 499: its path, its body, and its headers."""
    gzipped = {"Content-Encoding": "gzip"}
    bomb = gzip.compress(b'{"model": "small", "prompt": "' + b"x" * (32 << 20) + b'"}')
    objects = b'{"model": "small", "prompt": "x", "a": [' + b'{"a":{}},' * 400_000 + b"0]}"
    made: dict[str, tuple[Any, dict[str, str]]] = {
        "bomb": (bomb, gzipped),
        "bomb of objects": (gzip.compress(objects), gzipped),
        "no gzip": (b'{"model": "small", "prompt": "x"}', gzipped),
        "nesting": (_nested(100_000), {}),
        "objects": (objects, {}),
        "no JSON": (b'{"model": "small", "prompt": ', {}),
        "no text": (b'\xff\xfe{"model"', {}),
        "wrong types": (_completion(prompt={"a": 1}, max_tokens="many"), {}),
        "unknown model": (_completion(model="none"), {}),
        "choices": (_completion(n=16_384), {}),
        "prompts": (_completion(prompt=["x"] * 20_000), {}),
        "token ids": (_completion(prompt=[2**31, -1]), {}),
        "schema": (_completion(structured_outputs={"json": _schema(20_000)}), {}),
        "choice": (
            _completion(structured_outputs={"choice": [f"c{n}" for n in range(50_000)]}),
            {},
        ),
    }
    return {
        name: (PATH, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        for name, (body, headers) in made.items()
    }


class Mob:
    """Some clients in threads of their own; what they were answered is counted and judged."""

    def __init__(self, urls: Mapping[str, str], seed: int) -> None:
        self._ports = {name: int(url.rpartition(":")[2]) for name, url in urls.items()}
        self._draw = random.Random(seed)
        self._bodies = _bodies()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.counts: Counter[str] = Counter()
        self.wrongs: list[str] = []  # answers that should have been refusals

    def start(self) -> None:
        """Begin."""
        for number in range(COUNT):
            draw = random.Random(self._draw.random())
            thread = threading.Thread(target=self._main, args=(draw,), name=f"mob {number}")
            thread.daemon = True
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End, and wait for the last of them to leave."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)

    def _main(self, draw: random.Random) -> None:
        while not self._stopping.wait(PAUSE * draw.uniform(0.2, 1.8)):
            port = self._ports[draw.choice(sorted(self._ports))]
            try:
                draw.choice((self._leave, self._send, self._send))(port, draw)
            except (ConnectionError, TimeoutError):
                self.counts["no answer"] += 1  # from a node that is stopped, or has ended
            except OSError as error:
                if error.errno != errno.ENOTCONN:  # it had ended before its client could leave
                    self.wrongs.append(f"an unwelcome client failed: {error!r}")
                self.counts["no answer"] += 1
            except Exception as error:
                self.wrongs.append(f"an unwelcome client failed: {error!r}")

    def _leave(self, port: int, draw: random.Random) -> None:
        """Ask for a long answer, read some of it or nothing, and go."""
        way, late = draw.choice(WAYS), draw.uniform(0.0, STAYS)
        body = _completion(
            prompt=[draw.randrange(3, 1000) for _ in range(draw.randrange(4, 200))],
            max_tokens=1000,
            ignore_eos=True,
            stream=draw.random() < 0.7,
            n=draw.choice((1, 1, 2)),
        )
        data = post(PATH, body)
        with contextlib.closing(Client(port, draw.choice((0, SMALL)))) as client:
            client.socket.settimeout(PATIENCE)
            # Some are gone before their request is.
            client.send(data if draw.random() < 0.8 else data[: draw.randrange(len(data))])
            if draw.random() < 0.5:
                client.socket.settimeout(late + 0.01)
                with contextlib.suppress(TimeoutError):
                    client.read()
            time.sleep(late)
            client.leave(way)
            if way == "half":
                client.socket.settimeout(PATIENCE)
                client.rest()
        self.counts[f"left ({way})"] += 1

    def _send(self, port: int, draw: random.Random) -> None:
        """Send what nobody should take."""
        name = draw.choice(sorted(self._bodies))
        path, body, headers = self._bodies[name]
        with contextlib.closing(Client(port)) as client:
            client.socket.settimeout(PATIENCE)
            more = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
            client.send(head("POST", path, more | {"Connection": "close"}))
            # It may be refused before it is there.
            with contextlib.suppress(ConnectionError):
                client.send(body)
            answer = client.rest()
        status = int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0
        if not status:
            self.counts["no answer"] += 1
        elif status in UNAVAILABLE:
            self.counts["unavailable"] += 1
        elif 400 <= status < 500:
            self.counts["refused"] += 1
        else:
            self.wrongs.append(f"{name} was answered with {status}: {_said(answer)}")


def _said(answer: bytes) -> str:
    return answer.partition(b"\r\n\r\n")[2][:200].decode(errors="replace")


def summary(counts: Mapping[str, int]) -> str:
    """What they have done, in words."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"
