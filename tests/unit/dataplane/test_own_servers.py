"""API servers in processes of their own: a node knows them by the socket file that they come by."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from llumnix.cluster import is_server_of, server_name
from llumnix.dataplane import peer_link
from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.frames import NodeNews
from llumnix.dataplane.peer import PATH, Peers, ThisNode
from llumnix.engine.base import EngineDead, EngineError
from tests.kit.loop import on_loop, soon
from tests.kit.mesh import TOKEN, MeshDispatcher, MeshNode, mesh

NEWS = NodeNews(None, False, 1.0, "", [{"about": "a"}], False, None)


@asynccontextmanager
async def server_of(node: MeshNode, file: bool = True) -> AsyncIterator[Exchange]:
    """An API server of a node, in this process; `file`: it comes by the socket file."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "servers")
        app = web.Application()
        app.router.add_get(PATH, node.peers.accept_own)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.UnixSite(runner, path).start()
        me = ThisNode(server_name(node.name, 0), "", "test")
        own = (node.name, path) if file else None
        peers = Peers(me, TOKEN, {node.name: node.address}.get, own_node=own)
        exchange = Exchange(me.node, peers, host=node.name)
        client = ClusterClient(exchange, MeshDispatcher(node), 4)
        try:
            yield exchange
        finally:
            client.shutdown()
            await exchange.close()
            await runner.cleanup()


def test_names() -> None:
    assert is_server_of(server_name("a-1", 3), "a-1")
    assert not is_server_of("a", "a") and not is_server_of("b#1", "a")


@on_loop
async def test_only_its_own_servers_may_have_anything_done() -> None:
    async with mesh("a", "b") as (a, b), server_of(a) as own:
        instance = await a.host()

        async def secret(instance: str) -> str:
            return "told"

        a.exchange.own_procedures["api.secret"] = secret
        assert await own.call("a", "", "api.secret", (), 5.0) == "told"
        with pytest.raises(EngineError, match="a peer may not call api"):
            await b.exchange.call("a", "", "api.secret", (), 5.0)
        with pytest.raises(EngineError, match="a peer may not call collective_rpc"):
            await b.exchange.call("a", instance, "collective_rpc", (), 5.0)
        with pytest.raises(EngineError) as refused:  # by the modelled engine, which has it not
            await own.call("a", instance, "collective_rpc", (), 5.0)
        assert "may not" not in str(refused.value)


@on_loop
async def test_who_has_the_token_does_not_become_a_server_by_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with mesh("a") as (a,), server_of(a, file=False) as stranger:
        with pytest.raises(EngineDead, match="node a does not answer"):
            await stranger._peers.link("a")
        assert "a#0 comes another way" in caplog.text and a.peers.open == 0


@on_loop
async def test_news_come_from_the_own_node_alone() -> None:
    heard: list[NodeNews] = []
    async with mesh("a", "b") as (a, b), server_of(a) as own:
        own.on_news = heard.append
        await own._peers.link("a")
        await soon(lambda: "a#0" in a.peers._links)
        a.peers._links["a#0"].send(NEWS)
        await soon(lambda: heard == [NEWS])
        b.exchange.on_news = heard.append
        (await a.peers.link("b")).send(NEWS)
        await a.exchange.reach(["b"], 1.0)
        assert len(heard) == 1


@on_loop
async def test_an_answer_that_is_too_large_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with mesh("a", "b") as (a, b):
        await b.host()
        small = await a.ask("small", [1, 2, 3], 4)
        await soon(lambda: small.ended)
        real = peer_link.Codec.encode

        def encode(codec: Any, frame: Any) -> bytes:
            large = any(output.request_id == "large" for output in getattr(frame, "outputs", ()))
            return b"x" * 5000 if large else real(codec, frame)

        monkeypatch.setattr(peer_link.Codec, "encode", encode)
        monkeypatch.setattr(peer_link, "MAX_FRAME", 4000)
        large, other = await a.ask("large", [4, 5, 6], 4), await a.ask("other", [7, 8, 9], 40)
        await soon(lambda: large.ended and other.ended)
        assert "too much for one message" in (large.failure or "")
        assert other.finish == "length" and len(other.tokens) == 40
        assert b.peers.open == 1, "the link is the same"
