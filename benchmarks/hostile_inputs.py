"""Inputs that are meant to harm a node, each a line in a table: what it is, and how it is done.

To add one, write a function that takes the Target and returns a few words about what came back, and
add it to ATTACKS. What it sends is made before the clock runs, by `make`, if that takes long.
"""

import contextlib
import gzip
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tests.kit.leaving import SMALL, WAYS, Client, head, post

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"model": "smol", "prompt": "Hello", "max_tokens": 6000, "ignore_eos": True}
TALK = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6000}


@dataclass(frozen=True)
class Target:
    """The node under attack, a key that its operator has given to the attacker, and the token
    that he has not given."""

    port: int
    key: str
    token: str
    idle: Callable[[], bool]  # whether it has nothing open but what watches it
    gap: Callable[[], float]  # the longest of the stream that is watched since the last look, ms

    @property
    def headers(self) -> dict[str, str]:
        """What a client with the key sends."""
        return {"Authorization": f"Bearer {self.key}"}

    def send(self, *requests: bytes, within: float = 60.0, at_once: int = 32) -> str:
        """Send whole requests, so many at once, and say with which statuses they were answered."""

        def ask(request: bytes) -> str:
            client = Client(self.port)
            try:
                client.socket.settimeout(within)
                with contextlib.suppress(OSError):  # it may be refused before all is sent
                    client.send(request)
                return (client.read().split(b" ", 2)[1:2] or [b"cut off"])[0].decode()
            except TimeoutError:
                return "no answer"
            finally:
                client.close()

        with ThreadPoolExecutor(at_once) as pool:
            counts = Counter(pool.map(ask, requests))
        return ", ".join(f"{n} x {status}" for status, n in counts.items())

    @contextlib.contextmanager
    def clients(
        self, number: int, data: Sequence[bytes], buffer: int = 0
    ) -> Iterator[list[Client]]:
        """So many connections, each of which has sent one of `data`, in turn."""
        clients: list[Client] = []
        try:
            for turn in range(number):
                clients.append(Client(self.port, buffer).send(data[turn % len(data)]))
            yield clients
        finally:
            for client in clients:
                client.close()


@dataclass(frozen=True)
class Attack:
    """One kind of hostile input."""

    name: str
    what: str
    strike: Callable[[Target, Any], str]
    make: Callable[[Target], Any] = lambda target: None
    engines: bool = False  # whether it is meant for real ones: modelled ones take no grammar


def ask(path: str, content: Callable[[], Any], times: int = 1, **headers: str) -> dict[str, Any]:
    """An attack of whole requests with a key, with one body."""

    def make(target: Target) -> list[bytes]:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        return [post(path, content(), target.headers | more)] * times

    return {"make": make, "strike": lambda target, requests: target.send(*requests)}


def many_objects(number: int) -> bytes:
    """JSON of little objects, which costs a parser the most for its size."""
    return b'{"model":"smol","prompt":"x","a":[' + b'{"a":{}},' * (number - 1) + b'{"a":{}}]}'


def bomb() -> bytes:
    """The same, as 87 kB of gzip."""
    return gzip.compress(many_objects(3_000_000), 9)


def prompt(size: int, **more: Any) -> Callable[[], Any]:
    """A completion of a long prompt."""
    return lambda: {"model": "smol", "prompt": "word " * (size // 5), "max_tokens": 1, **more}


def hold(data: Callable[[Target], bytes], number: int, seconds: float) -> dict[str, Any]:
    """An attack of connections that have sent something and wait."""

    def strike(target: Target, sent: bytes) -> str:
        with target.clients(number, [sent]):
            answer = target.send(head("GET", "/livez", {}), within=10.0)
            time.sleep(seconds)
        return f"/livez meanwhile: {answer}"

    return {"make": data, "strike": strike}


def crowd(target: Target, moment: float, number: int = 1000) -> str:
    """Clients of all routes ask for long answers, read nothing and leave, in every way at once."""
    bodies = [(COMPLETIONS, LONG), (CHAT, TALK), ("/invocations", LONG), ("/generate", LONG)]
    data = [
        post(path, body | {"stream": stream}, target.headers | more)
        for stream in (True, False)
        for path, body in bodies
        for more in ({}, {"Origin": "http://elsewhere"})
    ]
    with target.clients(number, data, SMALL) as clients:
        time.sleep(moment)
        before = target.gap()
        for turn, client in enumerate(clients):
            client.leave(WAYS[turn % len(WAYS)])
        left = time.monotonic()
        while not target.idle() and time.monotonic() - left < 60:
            time.sleep(0.1)  # asking is work for the node, too
        seconds = time.monotonic() - left
        return f"all ended {seconds:.2f} s later; gap until they left {before:.0f} ms"


def half_body(target: Target) -> bytes:
    """The beginning of a large body."""
    headers = {"Content-Length": str(3 << 20), "Content-Type": "application/json"}
    return head("POST", COMPLETIONS, target.headers | headers) + b" " * (1 << 20)


def schema() -> dict[str, Any]:
    """A schema of 20,000 properties, of which a grammar would be made."""
    properties = {f"property_{n}": {"type": "string"} for n in range(20_000)}
    return {
        **{"model": "smol", "prompt": "x", "max_tokens": 4},
        "structured_outputs": {"json": {"type": "object", "properties": properties}},
    }


def grammar(**spec: Any) -> Callable[[], Any]:
    """A completion with something of which a grammar is made."""
    return lambda: {"model": "smol", "prompt": "x", "max_tokens": 4, "structured_outputs": spec}


def optional(number: int) -> dict[str, Any]:
    """A schema of properties that may all be missing: dear to compile for its size."""
    properties = {f"property_{n}": {"type": "string"} for n in range(number)}
    return {"type": "object", "properties": properties}


def different_schemas(target: Target) -> list[bytes]:
    """Requests with a schema each, every one of which takes a compiler about a second."""
    schemas = [optional(300) | {"title": str(n)} for n in range(8)]
    return [post(COMPLETIONS, grammar(json=s)(), target.headers) for s in schemas]


def of_prompts(number: int, **parameters: Any) -> Callable[[], dict[str, Any]]:
    """So many prompts of a word, and parameters that each of them has."""
    said = {"model": "smol", "prompt": ["x"] * number, "max_tokens": 1}
    return lambda: said | parameters


def talk(number: int, message: Any) -> Callable[[], Any]:
    """A chat of so many messages."""
    return lambda: {"model": "smol", "messages": [message] * number, "max_tokens": 1}


# A page's question whether it may call the route, which needs no key.
HOST = b"OPTIONS /v1/embeddings HTTP/1.1\r\nOrigin: http://a\r\n"
HOST += b"Access-Control-Request-Method: POST\r\nHost: a" + "\u0315\u0300".encode() * 15_000
HOST += b"\r\n\r\n"
PART = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
JUNK = b"GET / HTTP/1.1\r\nno colon\r\n\r\n"
PIPELINE = head("GET", "/livez", {}) * 2000

ATTACKS: tuple[Attack, ...] = (
    Attack("nothing", "the stream alone, for comparison", lambda t, _: time.sleep(3.0) or ""),
    Attack("bomb", "45 MB of objects as gzip", **ask(COMPLETIONS, bomb, Content_Encoding="gzip")),
    Attack(
        "bombs",
        "30 of them at once, to a route that no middleware of vLLM's guards",
        **ask("/invocations", bomb, 30, Content_Encoding="gzip"),
    ),
    Attack(
        "false gzip",
        "plain JSON that is said to be gzip, 200 times",
        **ask(COMPLETIONS, prompt(10), 200, Content_Encoding="gzip"),
    ),
    Attack("objects", "27 MB of objects", **ask(COMPLETIONS, lambda: many_objects(3_000_000))),
    Attack(
        "some objects",
        "4 MB of objects, 10 times",
        **ask(COMPLETIONS, lambda: many_objects(400_000), 10),
    ),
    Attack(
        "nesting", "100,000 levels", **ask(COMPLETIONS, lambda: b"[" * 100_000 + b"]" * 100_000)
    ),
    Attack("prompt", "a prompt of 400 kB, 10 times", **ask(COMPLETIONS, prompt(400_000), 10)),
    Attack("tokenize", "2 MB to /tokenize, 5 times", **ask("/tokenize", prompt(2_000_000), 5)),
    Attack(
        "prompts", "a list of 10,000 prompts",
        **ask(COMPLETIONS, lambda: {"model": "smol", "prompt": ["x"] * 10_000, "max_tokens": 1}),
    ),
    Attack("choices", "n = 16,384", **ask(COMPLETIONS, prompt(10, n=16_384))),
    Attack("schema", "a schema of 20,000 properties", **ask(COMPLETIONS, schema), engines=True),
    Attack("large schema", "one of 1,000 properties", engines=True, **ask(
        COMPLETIONS, grammar(json=optional(1000)))),
    Attack("schemas", "8 of 300 properties each, at once", engines=True,
           make=different_schemas, strike=lambda t, requests: t.send(*requests)),
    Attack("choice", "200,000 strings to choose from", engines=True, **ask(
        COMPLETIONS, grammar(choice=[f"number {n}" for n in range(200_000)]))),
    Attack("some choice", "4,000 strings to choose from", engines=True, **ask(
        COMPLETIONS, grammar(choice=[f"number {n}" for n in range(4000)]))),
    Attack("regex", "nested repeats", engines=True, **ask(
        COMPLETIONS, grammar(regex="((a{1,200}b{1,200}){1,200}c){1,200}"))),
    Attack("ambiguous grammar", "whose text becomes dearer with its length", engines=True, **ask(
        COMPLETIONS, grammar(grammar='root ::= root root root | root root | "#"'))),
    Attack("content type", "8,000 parameters of a Content-Type", **ask(
        COMPLETIONS, prompt(10), Content_Type="a/b" + ";a" * 8_000)),
    Attack("host", "60 KB of combining characters as Host, without a key",
           lambda t, _: t.send(HOST)),
    Attack("messages", "2,048 messages", **ask(CHAT, talk(2048, {"role": "user", "content": "x"}))),
    Attack("wrong messages", "2,048 that are none", **ask(CHAT, talk(2048, {}))),
    Attack("wrong contents", "2,048 of a wrong content", **ask(
        CHAT, talk(2048, {"role": "user", "content": 1}))),
    Attack("many prompts", "512 prompts of a word", **ask(
        COMPLETIONS, lambda: {"model": "smol", "prompt": ["x"] * 512, "max_tokens": 1})),
    Attack("choices of prompts", "32 prompts, n = 64", **ask(COMPLETIONS, lambda: {
        **{"model": "smol", "prompt": ["x"] * 32, "n": 64, "max_tokens": 1}})),
    Attack("parameters of prompts", "512 prompts, 90,000 values in vllm_xargs", **ask(
        COMPLETIONS, of_prompts(512, vllm_xargs={"a": [1] * 90_000}))),
    Attack("some parameters of prompts", "512 prompts, 190 values in vllm_xargs", **ask(
        COMPLETIONS, of_prompts(512, vllm_xargs={"a": [1] * 190}))),
    Attack("words of prompts", "512 prompts, 24 bad_words", **ask(
        COMPLETIONS, of_prompts(512, bad_words=[f"w{n:04}" for n in range(24)]))),
    Attack("hidden choices", "n = 16,384 behind 30 zeros", **ask(
        COMPLETIONS, prompt(10, n="0" * 30 + "16384"))),
    Attack("ids", "a prompt of 100,000 token ids", **ask(
        COMPLETIONS, lambda: {"model": "smol", "prompt": [7] * 100_000})),
    Attack("long numbers", "1,000 numbers of 4,000 digits", **ask(
        COMPLETIONS, lambda: b'{"prompt":[' + b",".join([b"1" * 4000] * 1000) + b"]}")),
    Attack("form", "50,000 parts of a form", **ask("/v1/audio/transcriptions",
        lambda: PART * 50_000 + b"--x--", Content_Type="multipart/form-data; boundary=x")),
    Attack("no JSON", "4 MB of plain text to a route of JSON", **ask(
        COMPLETIONS, lambda: b"x" * 4_000_000, Content_Type="text/plain")),
    Attack("idle", "1,100 connections that send nothing", **hold(lambda t: b"", 1100, 3.0)),
    Attack(
        "half heads", "1,100 that send half a head",
        **hold(lambda t: b"POST / HTTP/1.1\r\nHost: x\r\n", 1100, 3.0),
    ),
    Attack("half bodies", "100 that send 1 MiB of 3", **hold(half_body, 100, 3.0)),
    Attack(
        "no HTTP", "1,000 malformed requests", lambda t, _: t.send(*[JUNK] * 1000)
    ),
    Attack("pipeline", "2,000 requests behind one another on each of 8 connections",
           **hold(lambda t: PIPELINE, 8, 3.0)),
    Attack("metrics", "the operators' /metrics, 20 times", lambda t, _: t.send(*[head(
        "GET", "/metrics", {"Authorization": f"Bearer {t.token}", "Connection": "close"})] * 20,
        at_once=2)),
    Attack("leave at once", "1,000 clients ask and leave", lambda t, _: crowd(t, 0.0)),
    Attack("leave later", "1,000 clients leave after 2 s", lambda t, _: crowd(t, 2.0)),
)  # fmt: skip
