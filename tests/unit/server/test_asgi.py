"""What is added to the answers of an application."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from llumnix.server import asgi
from tests.kit.leaving import Client, head
from tests.kit.serving import serving


@pytest.mark.parametrize(
    ("status", "own", "expected"), [(503, [], 1), (503, [b"9"], 9), (200, [], 0)]
)
def test_what_is_not_served_now_says_when_to_come_again(
    status: int, own: list[bytes], expected: int
) -> None:
    async def application(scope: Any, receive: asgi.Receive, send: asgi.Send) -> None:
        headers = [(b"retry-after", value) for value in own]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"x"})

    async def handle(request: web.Request) -> web.StreamResponse:
        return await asgi.serve(application, asgi.scope_of(request), request, b"")

    async def check() -> str:
        async with serving(handle) as port:
            client = Client(port).send(head("GET", "/", {"Connection": "close"}))
            return (await asyncio.to_thread(client.rest)).decode()

    answer = asyncio.run(check())
    said = [line for line in answer.split("\r\n") if line.lower().startswith("retry-after")]

    assert [line.partition(": ")[2] for line in said] == ([str(expected)] if expected else [])
