"""A node's door on a loopback socket, before a handler that only says who came."""

import argparse
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from llumnix.config import Config
from llumnix.server.door.access import AccessRules
from llumnix.server.door.callers import CALLER
from llumnix.server.door.cors import allow_origins
from llumnix.server.errors import openai_errors
from tests.kit.etcd import free_ports


def options(**given: Any) -> argparse.Namespace:
    """vLLM's options as far as the door knows them."""
    values = {"api_key": None, "root_path": None, "allowed_origins": [], "port": 1, "uds": None}
    values |= {"allow_credentials": False}
    return argparse.Namespace(**values | given)


def rules(
    given: dict[str, Any], kept: str | None = None, keeps: bool = False, **config: Any
) -> AccessRules:
    """The rules of a node with these options of vLLM's and of llumnix's."""
    resolved = Config(**config).resolved("127.0.0.1", 1)
    return AccessRules(resolved, options(**given), kept, keeps)


class Door:
    """A server behind the door, and a client of it."""

    def __init__(self, client: aiohttp.ClientSession, ports: Sequence[int]) -> None:
        self._client = client
        self.port, self.admin_port = ports
        self.read: list[str] = []  # the paths of which a handler has read the body

    async def ask(
        self, path: str, key: str | None = None, method: str = "GET", **given: Any
    ) -> tuple[int, str]:
        """The status and the text of an answer."""
        headers = dict(given.pop("headers", {}))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        port = given.pop("port", self.port)
        url = f"http://127.0.0.1:{port}{path}"
        async with self._client.request(method, url, headers=headers, **given) as answer:
            self.headers = answer.headers
            return answer.status, await answer.text()

    async def status(self, path: str, key: str | None = None, **given: Any) -> int:
        """The status of an answer alone."""
        return (await self.ask(path, key, **given))[0]


@asynccontextmanager
async def door(made_token: str = "", given: Any = None, **config: Any) -> AsyncIterator[Door]:
    """The door with these options, open; `given` are vLLM's."""
    ports = free_ports(2)
    if "admin_address" in config:
        config["admin_address"] = f"127.0.0.1:{ports[1]}"
    access = rules(given or {}, **config)

    async def handle(request: web.Request) -> web.StreamResponse:
        opened.read.append(request.path)
        await request.read()
        caller = request.get(CALLER)
        return web.Response(text="nobody" if caller is None else caller.name)

    middlewares = [
        allow_origins(options(**given or {})),
        openai_errors,
        access.guard(made_token).middleware,
    ]
    app = web.Application(middlewares=middlewares)
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    for port in ports:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        async with aiohttp.ClientSession() as client:
            opened = Door(client, ports)
            yield opened
    finally:
        await runner.cleanup()
