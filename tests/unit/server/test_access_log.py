"""No line of a log shows more than a little of what a caller has sent, and none of it raw."""

import asyncio
import logging

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from llumnix.server.access_log import SHOWN, shown
from tests.kit.leaving import Client, head
from tests.kit.serving import serving


@given(st.text(max_size=2 * SHOWN))
def test_any_text_is_shown_in_one_line(text: str) -> None:
    seen = shown(text)
    assert len(seen) < SHOWN + 30
    assert seen.replace("…", "").isascii() and seen.replace("…", "").isprintable()
    if text.isascii() and text.isprintable() and len(text) <= SHOWN:
        assert seen == text


async def _fail(request: web.Request) -> web.StreamResponse:
    if request.path.startswith("/ok"):
        raise web.HTTPNotFound()
    raise RuntimeError("a bug")


@pytest.mark.parametrize("path", ["/ok", "/x", "/ok" + "a" * 8000, "/x%0aERROR%1b[2J" + "b" * 8000])
def test_a_refused_request_is_a_short_line(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with serving(_fail) as port:
            client = Client(port).send(head("GET", path, {"Connection": "close"}))
            await asyncio.to_thread(client.rest)

    with caplog.at_level(logging.INFO):
        asyncio.run(check())
    said = [r.getMessage() for r in caplog.records if r.name.startswith("llumnix")]
    ours = [line for line in said if "GET" in line]
    assert ours and all(len(line) < 300 for line in ours)
    assert all(line.isprintable() for line in ours)
    assert any(line.startswith('127.0.0.1 "GET /') and path[:4] in line for line in ours)
