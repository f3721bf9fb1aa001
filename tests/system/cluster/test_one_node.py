"""One node with two modelled instances: its routes, and what it does with bad input."""

import argparse
import asyncio
import http.client
import itertools
import json
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from llumnix.server import asgi
from llumnix.server.errors import openai_errors
from llumnix.server.transport.listener import Listener
from tests.kit.etcd import free_ports
from tests.kit.node import Node
from tests.kit.wait import eventually

pytestmark = pytest.mark.cluster

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": "Hello", "max_tokens": 5} | more


# ---- what it offers ----


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/version", "/ping"])
def test_probes(one: Node, path: str) -> None:
    assert one.get(path).status == 200


def test_the_status_page(one: Node) -> None:
    status = one.status
    assert status["node"] == status["leader"] == "one"
    assert [n["id"] for n in status["nodes"]] == ["one"]
    assert [(i["id"], i["node"], i["state"]) for i in status["instances"]] == [
        ("one-0", "one", "ready"),
        ("one-1", "one", "ready"),
    ]
    assert status["view_age_seconds"] < 5


def test_metrics_of_vllm_and_of_llumnix(one: Node) -> None:
    assert one.post(COMPLETIONS, completion()).status == 200
    metrics = one.metrics()
    assert metrics["llumnix_nodes"] == metrics["llumnix_leader"] == 1
    assert metrics['llumnix_instances{state="ready"}'] == 2
    assert one.metric("llumnix_dispatches_total") >= 1
    assert one.metric("vllm:generation_tokens_total") >= 5
    assert one.metric("llumnix_dispatch_seconds_count") >= 1


def test_models(one: Node) -> None:
    answer = one.get("/v1/models").json
    assert [model["id"] for model in answer["data"]] == ["small"]
    assert answer["data"][0]["max_model_len"] == 2048


def test_tokenize_and_back(one: Node) -> None:
    tokens = one.post("/tokenize", {"model": "small", "prompt": "Hello, world"}).json["tokens"]
    assert tokens
    back = one.post("/detokenize", {"model": "small", "tokens": tokens}).json
    assert back["prompt"] == "Hello, world"


def test_a_completion_and_its_stream(one: Node) -> None:
    whole = one.post(COMPLETIONS, completion(max_tokens=20)).json
    assert whole["usage"]["completion_tokens"] == 20
    assert whole["choices"][0]["finish_reason"] == "length"
    with one.stream(COMPLETIONS, completion(max_tokens=20)) as events:
        assert events.text() == whole["choices"][0]["text"]
        assert events.done


def test_a_chat_and_its_stream(one: Node) -> None:
    body = {"model": "small", "messages": HELLO, "max_tokens": 20}
    whole = one.post(CHAT, body).json["choices"][0]["message"]["content"]
    body["stream_options"] = {"include_usage": True}
    with one.stream(CHAT, body) as stream:
        events = list(stream)
    assert stream.done
    deltas = [e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]]
    assert "".join(deltas) == whole
    assert events[-1]["usage"]["completion_tokens"] == 20


def test_the_demo_route(one: Node) -> None:
    body = {"prompt": "Hello", "max_tokens": 10}
    whole = one.post("/generate", body).json["text"][0]
    assert whole.startswith("Hello") and len(whole) > len("Hello")
    lines = one.post("/generate", body | {"stream": True}).text.splitlines()
    texts = [json.loads(line)["text"][0] for line in lines]
    assert texts[-1] == whole
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_the_demo_route_with_two_choices(one: Node) -> None:
    """Each line of a stream has both, in their order, and the last one is complete."""
    body = {"prompt": "Hello", "max_tokens": 10, "n": 2, "temperature": 1.0, "seed": 3}
    whole = one.post("/generate", body).json["text"]
    lines = one.post("/generate", body | {"stream": True}).text.splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(whole) == 2 and texts[-1] == whole
    for before, after in itertools.pairwise(texts):
        assert all(b.startswith(a) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("path", ["/livez", "/metrics", "/llumnix/nowhere", "/v1/models"])
def test_pages_of_other_sites_may_read_the_answers(one: Node, path: str) -> None:
    """Of those that --allowed-origins names, and as vLLM's application has it for its own."""
    for origin, allowed in (("http://elsewhere", "http://elsewhere"), ("http://nowhere", None)):
        answer = one.request("GET", path, headers={"Origin": origin})
        headers = {name.lower(): value for name, value in answer.headers.items()}
        assert headers.get("access-control-allow-origin") == allowed


def test_long_headers_and_many(one: Node) -> None:
    """As many as vLLM's server takes, and as long as others do: they come before any key."""
    headers = {"Cookie": "c" * 60_000} | {f"X-{n}": "x" for n in range(200)}
    assert one.post(COMPLETIONS, completion(), headers=headers).status == 200
    headers["Cookie"] = "c" * 100_000
    assert one.post(COMPLETIONS, completion(), headers=headers).status == 431


def test_both_instances_get_work(one: Node) -> None:
    for n in range(20):
        assert one.post(COMPLETIONS, completion(prompt=f"No. {n}")).status == 200
    dispatched = [v for k, v in one.metrics().items() if k.startswith("llumnix_dispatches_total")]
    assert len(dispatched) == 2 and min(dispatched) >= 5


# ---- bad input ----

BAD: dict[str, tuple[str, str, Any, int]] = {
    "malformed JSON": ("POST", COMPLETIONS, b'{"model": "small", "prompt": ', 400),
    "no JSON": ("POST", CHAT, b"hello", 400),
    "an empty body": ("POST", CHAT, b"", 400),
    "a list": ("POST", COMPLETIONS, [1, 2], 400),
    "null": ("POST", COMPLETIONS, b"null", 400),
    "deep nesting": ("POST", COMPLETIONS, b"[" * 20_000, 400),
    "invalid UTF-8": ("POST", COMPLETIONS, b'{"prompt": "\xff\xfe"}', 400),
    "prompt of the wrong type": ("POST", COMPLETIONS, completion(prompt={"a": 1}), 400),
    "prompt missing": ("POST", COMPLETIONS, {"model": "small"}, 400),
    "messages of the wrong type": ("POST", CHAT, {"model": "small", "messages": 3}, 400),
    "messages missing": ("POST", CHAT, {"model": "small"}, 400),
    "a role that is none": (
        "POST",
        CHAT,
        {"model": "small", "messages": [{"role": 1, "content": "x"}]},
        400,
    ),
    "max_tokens of the wrong type": ("POST", COMPLETIONS, completion(max_tokens="many"), 400),
    "max_tokens 0": ("POST", COMPLETIONS, completion(max_tokens=0), 400),
    "max_tokens -1": ("POST", COMPLETIONS, completion(max_tokens=-1), 400),
    "a demo seed of the wrong type": ("POST", "/generate", {"prompt": "x", "seed": "abc"}, 400),
    "demo max_tokens of the wrong type": (
        "POST",
        "/generate",
        {"prompt": "x", "max_tokens": 5.5},
        400,
    ),
    "a demo grammar that is none": (
        "POST",
        "/generate",
        {"prompt": "x", "structured_outputs": {"json": {}}},
        400,
    ),
    "a demo parameter of vLLM's own": (
        "POST",
        "/generate",
        {"prompt": "x", "_bad_words_token_ids": [[]]},
        400,
    ),
    "deep nesting in a stream": (
        "POST",
        COMPLETIONS,
        b'{"stream": true, "x": ' + b"[" * 20_000,
        400,
    ),
    "temperature -1": ("POST", COMPLETIONS, completion(temperature=-1), 400),
    "top_p 2": ("POST", COMPLETIONS, completion(top_p=2), 400),
    "n 0": ("POST", COMPLETIONS, completion(n=0), 400),
    "an empty prompt": ("POST", COMPLETIONS, completion(prompt=""), 400),
    "a token that is none": ("POST", COMPLETIONS, completion(prompt=[10**9]), 400),
    "an unknown model": ("POST", COMPLETIONS, completion(model="large"), 404),
    "a prompt too long": ("POST", COMPLETIONS, completion(prompt=[1] * 3000), 400),
    "a chat too long": (
        "POST",
        CHAT,
        {"model": "small", "messages": [{"role": "user", "content": "no " * 3000}]},
        400,
    ),
    "max_tokens too large": ("POST", COMPLETIONS, completion(max_tokens=5000), 400),
    "what this engine cannot do": ("POST", COMPLETIONS, completion(logprobs=3), 400),
    "a body too large": ("POST", COMPLETIONS, completion(prompt="x" * 200_000), 413),
    "an unknown route": ("GET", "/v1/nothing", None, 404),
    "an unknown route with a body": ("POST", "/v2/completions", completion(), 404),
    "the wrong method": ("GET", COMPLETIONS, None, 405),
    "the wrong method on a page of ours": ("POST", "/status", {}, 405),
    "another wrong method on one": ("DELETE", "/metrics", None, 405),
    "a demo body that is a list": ("POST", "/generate", [1], 400),
    "a demo body that is no JSON": ("POST", "/generate", b"{", 400),
    "a demo prompt of the wrong type": ("POST", "/generate", {"prompt": 1}, 400),
    "a demo parameter that is none": ("POST", "/generate", {"prompt": "x", "colour": 1}, 400),
    "a demo max_tokens 0": ("POST", "/generate", {"prompt": "x", "max_tokens": 0}, 400),
    "a demo prompt too long": ("POST", "/generate", {"prompt": "no " * 4000}, 400),
    "a demo body too large": ("POST", "/generate", {"prompt": "x" * 200_000}, 413),
    "a demo with the wrong method": ("GET", "/generate", None, 405),
    "tokens of the wrong type": ("POST", "/detokenize", {"model": "small", "tokens": "x"}, 400),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(one: Node, what: str) -> None:
    method, path, body, status = BAD[what]
    before = len(one.said)
    answer = one.request(method, path, body)
    assert answer.status == status, answer.text
    assert answer.error["code"] in (status, None)
    assert answer.seconds < 3.0
    line = f'"{method} {path} HTTP/1.1" {status} '
    eventually(lambda: line in one.said[before:])
    assert "Traceback" not in one.said[before:]
    eventually(one.idle)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_the_wrong_content_type(one: Node, content_type: str, stream: bool) -> None:
    answer = one.post(
        COMPLETIONS, completion(stream=stream), headers={"Content-Type": content_type}
    )
    assert answer.status in (400, 415), answer.text
    assert answer.error and answer.seconds < 3.0


def test_it_answers_as_before_after_all_that(one: Node) -> None:
    assert one.post(COMPLETIONS, completion()).json["usage"]["completion_tokens"] == 5


def test_what_is_no_http_at_all(one: Node) -> None:
    for junk in (b"\x16\x03\x01\x02\x00", b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", one.port), timeout=5) as connection:
            connection.sendall(junk)
            connection.shutdown(socket.SHUT_WR)
            began = time.monotonic()
            connection.recv(4096)
            assert time.monotonic() - began < 2.0
    assert one.get("/livez").status == 200


def test_a_client_that_never_sends_its_body(one: Node) -> None:
    with socket.create_connection(("127.0.0.1", one.port), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert one.post(COMPLETIONS, completion()).status == 200
    assert one.get("/livez").status == 200


@pytest.mark.parametrize("host", ["a:b:c", "a:99999999", "[::1"])
def test_a_host_that_is_none(one: Node, host: str) -> None:
    before = len(one.said)
    answer = one.post(COMPLETIONS, completion(), headers={"Host": host})
    assert answer.status == 400 and "Host" in answer.error["message"]
    assert "Traceback" not in one.said[before:]


# ---- cancellation ----


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate"])
def test_a_client_that_goes_away_frees_its_blocks(one: Node, path: str) -> None:
    body = completion(max_tokens=2000)
    if path == CHAT:
        body = {"model": "small", "messages": HELLO, "max_tokens": 1900}
    elif path == "/generate":
        del body["model"]
    with one.stream(path, body) as stream:
        assert stream.response.readline()
        eventually(lambda: one.metric("llumnix_instance_used_blocks") > 0)
    eventually(one.idle, within=3)  # uncancelled it would run for six seconds


def test_a_client_that_goes_away_while_it_waits_for_the_whole(one: Node) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", one.port)
    connection.request(
        "POST",
        COMPLETIONS,
        json.dumps(completion(max_tokens=2000, n=2)),
        {"Content-Type": "application/json"},
    )
    eventually(lambda: one.metric("llumnix_open_requests") == 2)
    connection.close()
    eventually(one.idle, within=3)  # uncancelled it would run for six seconds


# ---- the server's shell, without a node ----


def listening(app: web.Application, **more: Any) -> tuple[Listener, argparse.Namespace]:
    tls = dict.fromkeys(("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "ssl_ciphers", "uds"))
    limits = {"h11_max_incomplete_event_size": 4 << 20, "h11_max_header_count": 256}
    values = {"host": "127.0.0.1", "port": free_ports(1)[0], "ssl_cert_reqs": 0}
    values |= limits | tls | more
    arguments = argparse.Namespace(**values)
    return Listener(app, arguments), arguments


def test_a_fault_before_and_in_the_middle_of_an_answer() -> None:
    async def late(request: web.Request) -> web.StreamResponse:
        raise TimeoutError

    async def broken(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        raise RuntimeError("a bug")

    async def check() -> None:
        app = web.Application(middlewares=[openai_errors])
        app.router.add_get("/late", late)
        app.router.add_get("/broken", broken)
        listener, arguments = listening(app)
        await listener.open()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{arguments.port}") as client:
            answer = await client.get("/late")
            assert answer.status == 504 and (await answer.json())["error"]["code"] == 504
            answer = await client.get("/broken")
            assert answer.status == 200 and await answer.content.readany() == b"half"
            with pytest.raises(aiohttp.ClientPayloadError):
                await answer.content.read()
        await listener.close()

    asyncio.run(check())


def test_an_application_that_answers_and_then_fails() -> None:
    """As vLLM's does with a bug: what it has said to its client is what its client gets."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": scope["query_string"]})
        raise TimeoutError

    async def handle(request: web.Request) -> web.StreamResponse:
        return await asgi.serve(application, asgi.scope_of(request), request, b"")

    async def check() -> None:
        app = web.Application(middlewares=[openai_errors])
        app.router.add_get("/", handle)
        listener, arguments = listening(app)
        await listener.open()
        async with aiohttp.ClientSession() as client:
            url = URL(f"http://127.0.0.1:{arguments.port}/?a=%C3%A9%26", encoded=True)
            answer = await client.get(url)
            assert (answer.status, await answer.text()) == (500, "a=%C3%A9%26")
        await listener.close()

    asyncio.run(check())


@pytest.mark.parametrize("authority", [True, False])
def test_clients_must_show_a_certificate(tmp_path: Path, authority: bool) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)

    async def livez(request: web.Request) -> web.Response:
        return web.Response()

    async def check() -> None:
        app = web.Application()
        app.router.add_get("/livez", livez)
        listener, arguments = listening(
            app,
            ssl_certfile=cert,
            ssl_keyfile=key,
            ssl_cert_reqs=2,
            ssl_ca_certs=cert if authority else None,
            ssl_ciphers="ECDHE+AESGCM",
        )
        await listener.open()
        async with aiohttp.ClientSession(f"https://127.0.0.1:{arguments.port}") as client:
            peer = Listener.client_ssl(arguments)
            assert peer is not None
            assert (await client.get("/livez", ssl=peer)).status == 200
        async with aiohttp.ClientSession(f"https://127.0.0.1:{arguments.port}") as client:
            with pytest.raises((aiohttp.ClientError, ssl.SSLError)):
                await client.get("/livez", ssl=ssl.create_default_context(cafile=cert))
        await listener.close()

    asyncio.run(check())


def test_only_the_given_authority_vouches_for_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else the system trusts could otherwise stand in for any node."""
    paths = {}
    for name in ("ours", "another"):
        paths[name] = str(tmp_path / f"{name}.pem")
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj"]
        command += [f"/CN={name}", "-keyout", str(tmp_path / name), "-out", paths[name]]
        subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", paths["another"])
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    files = {"ssl_certfile": paths["ours"], "ssl_keyfile": str(tmp_path / "ours")}

    def trusted(authority: str | None) -> list[str]:
        arguments = argparse.Namespace(**files, ssl_ca_certs=authority, ssl_cert_reqs=0)
        context = Listener.client_ssl(arguments)
        assert context is not None
        return sorted(dict(pair[0] for pair in c["subject"])["commonName"]
                      for c in context.get_ca_certs())  # fmt: skip

    assert trusted(paths["ours"]) == ["ours"]
    assert trusted(None) == ["another", "ours"]
