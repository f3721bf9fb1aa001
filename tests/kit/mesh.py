"""Nodes' data paths side by side on one event loop: real links, real clients, modelled engines.

What is left out is what decides (actors, etcd, HTTP API): a test says where a request goes.
"""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from aiohttp import web
from vllm.v1.engine import EngineCoreOutput

from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.interruptions import Interruptions
from llumnix.dataplane.peer import PATH, Peers, ThisNode
from llumnix.dataplane.placer import NoInstance, Route
from llumnix.dataplane.waiting import WaitLimits
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.instance import Clock, SimEngine
from tests.kit.loop import soon
from tests.kit.requests import core_request

TOKEN = "secret"
FAILOVER_SECONDS = 2.0  # that a request without an instance waits for one
SMALL = ModelConfig(total_blocks=64, block_size=16, max_model_len=512)


class Gate:
    """A clock under which an engine steps only as often as it is told to."""

    def __init__(self) -> None:
        self._steps = asyncio.Semaphore(0)
        self._open = False
        self.waiting = 0

    def clock(self) -> Clock:
        return replace(Clock(), sleep=self._sleep)

    def let(self, steps: int) -> None:
        """Let so many steps end."""
        for _ in range(steps):
            self._steps.release()

    def open(self) -> None:
        """Let all steps end from now on."""
        self._open = True
        self.let(1000)

    async def _sleep(self, seconds: float) -> None:
        self.waiting += 1
        try:
            if not self._open:
                await self._steps.acquire()
        finally:
            self.waiting -= 1
        await asyncio.sleep(0)


class Stream:
    """What the frontend of a node gets for one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.failure: str | None = None

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.failure is not None


class MeshNode:
    """One node's server for its peers, its exchange, its client and the reader above that."""

    def __init__(self, name: str, mesh: "Mesh") -> None:
        self.name = name
        self._mesh = mesh
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.me = ThisNode(name, self.address, "test")
        self.peers = Peers(self.me, mesh.token, mesh.addresses.get)
        self.exchange = Exchange(name, self.peers)
        self.target: str | None = None  # the instance that every request is sent to
        self.dispatch: Callable[..., Awaitable[Route]] = self._dispatch
        self.known = mesh.instances  # the instances that it takes for ready, and their nodes
        self.awaited = False  # whether it sees one start
        self.gaps: list[float] = []  # in seconds, that moves have interrupted streams
        self.client = ClusterClient(
            self.exchange,
            MeshDispatcher(self),
            4,
            WaitLimits(FAILOVER_SECONDS),
            interruptions=Interruptions(on_gap=self.gaps.append),
        )
        self.client.bind(self._failed)
        self.streams: dict[str, Stream] = {}
        self._sequence = itertools.count(1)
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, shutdown_timeout=0.5)
        self._reader: asyncio.Task[None] | None = None
        self.decisions = 0

    @property
    def hosted(self) -> dict[str, HostedInstance]:
        return self.exchange.hosted

    def engine(self, instance: str) -> SimEngine:
        engine = self.hosted[instance].engine
        assert isinstance(engine, SimEngine)
        return engine

    async def open(self) -> None:
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()
        self._mesh.addresses[self.name] = self.address
        self._reader = asyncio.create_task(self._read(), name=f"reader-{self.name}")

    async def host(
        self, config: ModelConfig = SMALL, clock: Clock | None = None, engine: Any = None
    ) -> str:
        """Start an instance here; the first of the mesh becomes everybody's target."""
        slot = len(self.hosted)
        instance = f"{self.name}-{slot}"
        made = engine or SimEngine(instance, config, clock)
        hosted = HostedInstance(made, lambda: self.client, on_load=lambda: None)
        self.hosted[instance] = hosted
        await hosted.start(on_death=lambda reason: None)
        self._mesh.instances[instance] = self.name
        for node in self._mesh.nodes.values():
            node.target = node.target or instance
        return instance

    async def ask(
        self, name: str, prompt: Sequence[int], max_tokens: int = 8, **kwargs: Any
    ) -> Stream:
        """Send a request in, as vLLM's frontend does."""
        stream = self.streams[name] = Stream()
        await self.client.add_request_async(core_request(name, prompt, max_tokens, **kwargs))
        return stream

    async def answered(self, name: str, prompt: Sequence[int], max_tokens: int = 8) -> list[int]:
        """The tokens of a request that is sent in and runs to its end."""
        stream = await self.ask(name, prompt, max_tokens)
        await soon(lambda: stream.ended)
        assert stream.finish == "length", stream.failure
        return stream.tokens

    async def close(self) -> None:
        await self.exchange.close()
        await self._runner.cleanup()
        for hosted in self.hosted.values():
            await hosted.engine.stop(1.0)
        self.client.shutdown()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def clean(self) -> bool:
        """Whether nothing of any request is left, here and in the engines."""
        for hosted in self.hosted.values():
            engine = hosted.engine
            if isinstance(engine, SimEngine):
                engine.model.check()
                if engine.model.has_work and hosted.gone is None:
                    return False
            if hosted.requests:
                return False
        return not len(self.client.ledger) and not self.client._tasks

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get(PATH, self.peers.accept)
        return app

    async def _dispatch(self, tokens: int, priority: int, avoid: frozenset[str]) -> Route:
        instance = self.target
        if instance is None or instance in avoid:
            raise NoInstance("no instance is ready")
        return self.route(instance)

    def route(self, instance: str) -> Route:
        """The way to an instance, with a number of its own."""
        return Route(instance, self._mesh.instances[instance], next(self._sequence))

    async def _read(self) -> None:
        while True:
            batch = await self.client.get_output_async()
            for output in batch.outputs:
                self._take(output)

    def _take(self, output: EngineCoreOutput) -> None:
        stream = self.streams[output.request_id]
        assert not stream.ended, "an output behind the end"
        stream.tokens += output.new_token_ids
        if output.finish_reason is not None:
            stream.finish = str(output.finish_reason)

    def _failed(self, request_id: str, reason: str, status: HTTPStatus) -> None:
        stream = self.streams[request_id]
        assert not stream.ended, "a failure behind the end"
        stream.failure = reason


class MeshDispatcher:
    """Decides as the node's test says."""

    def __init__(self, node: MeshNode) -> None:
        self._node = node

    def ready(self) -> dict[str, str]:
        return self._node.known

    def awaited(self) -> bool:
        return self._node.awaited

    async def decide(self, tokens: int, priority: int, avoid: frozenset[str]) -> Route:
        self._node.decisions += 1
        return await self._node.dispatch(tokens, priority, avoid)

    def undo(self, route: Route) -> None:
        """Nothing counts what it has sent."""


class Mesh:
    """Nodes that know one another."""

    def __init__(self, token: str = TOKEN) -> None:
        self.token = token
        self.addresses: dict[str, str] = {}
        self.instances: dict[str, str] = {}
        self.nodes: dict[str, MeshNode] = {}

    async def node(self, name: str) -> MeshNode:
        node = self.nodes[name] = MeshNode(name, self)
        await node.open()
        return node


@asynccontextmanager
async def mesh(*names: str) -> AsyncIterator[tuple[MeshNode, ...]]:
    """Open nodes; at the end of the test nothing may be left of its requests."""
    whole = Mesh()
    nodes = [await whole.node(name) for name in names]
    try:
        yield tuple(nodes)
        for node in nodes:
            await soon(node.clean, within=15)
    finally:
        for node in nodes:
            await node.close()
