"""Ends of a peer link made by hand, each of which may do what no node would."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from llumnix.dataplane.frames import Codec, Hello
from llumnix.dataplane.peer import PATH
from llumnix.dataplane.peer_proof import PROOF, Door, Introduction, Key, answer, convinced
from tests.kit.mesh import TOKEN, MeshNode


class Accepter:
    """What answers as the node of a name does, up to the Hello; it takes itself for whoever is
    wanted at whatever address."""

    def __init__(self, token: str = TOKEN, life: str = "life-b") -> None:
        self._key, self._life = Key(token), life
        self._door: Door | None = None

    async def accept(self, request: web.Request, **kwargs: Any) -> web.StreamResponse:
        """The challenge, or a WebSocket on which the Hello has been said."""
        who = Introduction.read(request.headers)
        if self._door is None:
            self._door = Door(self._key, who.to, self._life, who.address)
        if PROOF not in request.headers:
            return web.Response(status=401, headers=self._door.ask(who))
        proof = self._door.admit(who, request.headers)
        socket = web.WebSocketResponse(**kwargs)
        await socket.prepare(request)
        await socket.send_bytes(Codec().encode(Hello(who.to, "test", proof)))
        return socket


def introduction(b: MeshNode, name: str = "c", life: str = "life-c", **more: str) -> Introduction:
    """What a node of that name says to b."""
    return Introduction(**{  # type: ignore[arg-type]
        "node": name, "life": life, "version": "test", "to": b.name, "address": b.address, **more
    })  # fmt: skip


async def proven(
    session: aiohttp.ClientSession, b: MeshNode, who: Introduction, token: str = TOKEN
) -> dict[str, str]:
    """The headers with which a node that has the token comes the second time."""
    key = Key(token)
    async with session.get(f"http://{b.address}{PATH}", headers=who.headers()) as reply:
        return answer(key, who, convinced(key, who, reply.status, reply.headers))


@asynccontextmanager
async def dialled(
    b: MeshNode, name: str = "c", life: str = "life-c"
) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """A connection to b by hand, with the right token, on which nothing has been read."""
    async with aiohttp.ClientSession() as session:
        headers = await proven(session, b, introduction(b, name, life))
        async with session.ws_connect(f"http://{b.address}{PATH}", headers=headers) as socket:
            yield socket
