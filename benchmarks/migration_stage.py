"""Two vLLM engines and the parts of a node around them, for measurements of migrations."""

import asyncio
import itertools
import os
import random
import tempfile
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine import EngineCoreRequest

from llumnix.actors.base import Handle
from llumnix.cluster import ClusterView, InstanceInfo, InstanceState
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.server import EmbeddedEtcd
from llumnix.control.etcd.session import Session
from llumnix.control.keys import Keys, Kind
from llumnix.dataplane.client import ClusterClient
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.peer import Peers, ThisNode
from llumnix.dataplane.placer import Route
from llumnix.engine.base import Transfer
from llumnix.engine.vllm.arguments import engine_config, make_parser
from llumnix.engine.vllm.instance import VllmEngine
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes.launcher import start_fork_server
from llumnix.engine.vllm.processes.placement import place
from llumnix.engine.vllm.processes.watchdog import Patience
from llumnix.migration.actor import MigrationActor
from llumnix.migration.departures import Rules
from llumnix.migration.messages import Move
from llumnix.migration.record import Handshake
from llumnix.migration.service import Migrations
from llumnix.migration.source import MigrationLimits
from llumnix.policy.decision_context import Terms

NODE = "bench"
ON_CPU = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096", "--block-size", "32"]


class Stream:
    """One request as its client sees it: when each token came."""

    def __init__(self, request: EngineCoreRequest, target: str) -> None:
        self.request = request
        self.target = target  # where it is to start
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._changed = asyncio.Event()
        self.failure: str | None = None

    @property
    def position(self) -> int:
        """Tokens so far."""
        return len(self.tokens)

    def take(self, tokens: Sequence[int], at: float) -> None:
        """Some tokens have come."""
        self.tokens += tokens
        self.times += [at] * len(tokens)
        self._changed.set()

    def fail(self, reason: str) -> None:
        """No more will come."""
        self.failure = reason
        self._changed.set()

    async def reach(self, position: int) -> None:
        """Wait for so many tokens. Raises RuntimeError if they will not come."""
        async with asyncio.timeout(120):
            while len(self.tokens) < position:
                if self.failure is not None:
                    raise RuntimeError(self.failure)
                self._changed.clear()
                await self._changed.wait()

    def steps(self, since: float = 0.0, until: float = float("inf")) -> list[tuple[float, float]]:
        """The time between two tokens, and when that was, for those within a span."""
        first, last = bisect_left(self.times, since), bisect_left(self.times, until)
        inside = self.times[first:last]
        return [(b - a, b) for a, b in itertools.pairwise(inside)]

    def widest(self, since: float, until: float) -> float:
        """The longest time between two tokens within a span, its ends included."""
        first = max(bisect_left(self.times, since) - 1, 0)
        inside = [t for t in self.times[first:] if t <= until]
        return max(b - a for a, b in itertools.pairwise(inside))


class Stage:
    """Two hosted engines of one node, and streams between them."""

    def __init__(self, exchange: Exchange, migrations: Migrations, device: str) -> None:
        self.device = device
        self.exchange = exchange
        self.instances = sorted(exchange.hosted)
        self.client = ClusterClient(exchange, self, len(self.instances))
        self.client.bind(lambda request_id, reason, refused: self._fail(request_id, reason))
        self._migrations = migrations
        self._streams: dict[str, Stream] = {}
        self._turn = 0

    def open(self, request: EngineCoreRequest, instance: str | None = None) -> Stream:
        """Send a request to an instance, in turn if none is named."""
        self._turn += 1
        stream = Stream(request, instance or self.instances[self._turn % 2])
        self._streams[request.request_id] = stream
        self.client.ledger.open(request.request_id, request)
        self.client._tasks.spawn(self.client._place(request.request_id))
        return stream

    async def end(self, stream: Stream) -> None:
        """End a stream, and forget what the engines remember of it."""
        del self._streams[stream.request.request_id]
        await self.client.abort_requests_async([stream.request.request_id])
        if not self._streams:
            await self.forget()

    async def forget(self) -> None:
        """Empty both prefix caches: a later move would find there what it ought to send."""
        for hosted in self.exchange.hosted.values():
            while not await hosted.engine.call("reset_prefix_cache", False, False):
                await asyncio.sleep(0.01)

    def ends(self, stream: Stream) -> tuple[str, str]:
        """The instance where a stream is, and the other one."""
        entry = self.client.ledger.get(stream.request.request_id)
        assert entry is not None and entry.owner is not None
        return entry.owner, next(i for i in self.instances if i != entry.owner)

    def copy_cpu_seconds(self) -> float:
        """CPU time that all transfers have taken."""
        return sum(h.engine.blocks.cpu_seconds for h in self.exchange.hosted.values())  # type: ignore[attr-defined]

    async def move(self, stream: Stream, destination: str, how: str) -> dict[str, float]:
        """Move a stream live, or by one of the two ways that stop it first."""
        source, _ = self.ends(stream)
        if how == "live":
            step = Move(destination, "operator", stream.request.request_id)
            moved = await self._migrations.command(NODE, source, step)
            return {k: float(getattr(moved, k)) for k in ("stages", "blocks_sent", "bytes_sent")}
        hosted, target = self.exchange.hosted[source], self.exchange.hosted[destination]
        held = hosted.find(stream.request.request_id)
        assert held is not None and target.facts is not None
        migration = f"{how}-{time.monotonic_ns()}"
        copied = 0
        await hosted.next_output(held, 10.0)
        if how == "copy":
            hashes = await hosted.engine.blocks.export(migration, held.name)
        # From here on nothing is generated.
        del hosted._by_name[held.name], hosted._by_id[held.request_id]
        await hosted.engine.abort([held.name])
        if how == "copy":
            copied = await self._copy(migration, hosted, target, hashes)
        hosted._by_name[held.name] = held
        hosted._by_id[held.request_id] = held
        await hosted.hand_over([held], destination, NODE)
        await stream.reach(stream.position + 1)
        await hosted.engine.blocks.drop(migration)
        await target.engine.blocks.drop(migration)
        return {"stages": 1.0, "blocks_sent": 0.0, "bytes_sent": float(copied)}

    async def _copy(
        self, migration: str, source: HostedInstance, target: HostedInstance, hashes: list[bytes]
    ) -> int:
        present = await target.engine.blocks.reserve(migration, hashes)
        pair = f"{source.id}--{target.id}"
        name = self._migrations._groups.name(pair, (source.life, target.life))
        transfer = Transfer(pair, name, present, len(hashes) - present, 60.0)
        sent, _ = await asyncio.gather(
            source.engine.blocks.send(migration, transfer),
            target.engine.blocks.receive(migration, transfer),
        )
        return sent

    async def read(self) -> None:
        """Hand what the client accepts to its streams; a task of its own."""
        while True:
            outputs = await self.client.get_output_async()
            now = time.monotonic()
            for output in outputs.outputs:
                if (stream := self._streams.get(output.request_id)) is not None:
                    stream.take(output.new_token_ids, now)

    def _fail(self, request_id: str, reason: str) -> None:
        if (stream := self._streams.get(request_id)) is not None:
            stream.fail(reason)

    def ready(self) -> dict[str, str]:
        """For the client, whose dispatcher this is: where requests may run."""
        return dict.fromkeys(self.instances, NODE)

    def awaited(self) -> bool:
        """None starts later."""
        return False

    def undo(self, route: Route) -> None:
        """Nothing counts what it has sent."""

    async def decide(self, tokens: int, priority: int, avoid: frozenset[str]) -> Route:
        """Each request to the instance that its stream is for."""
        waiting = [
            s for i, s in self._streams.items() if (e := self.client.ledger.get(i)) and not e.owner
        ]
        return Route(waiting[0].target, NODE, 0)


def request_of(name: str, prompt: int, seed: int, outputs: int) -> EngineCoreRequest:
    """A request of so many random prompt tokens, which goes on for so many outputs."""
    draw = random.Random(f"{name}{seed}{time.monotonic_ns()}")
    return EngineCoreRequest(
        request_id=f"{name}-{draw.getrandbits(32):x}",
        prompt_token_ids=[draw.randrange(1000, 30_000) for _ in range(prompt)],
        mm_features=None,
        sampling_params=SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def engine_arguments(model: str, extra: Sequence[str]) -> VllmConfig:
    """vLLM's configuration of both engines."""
    parser = make_parser("bench")
    own = ON_CPU if current_platform.is_cpu() else []
    return engine_config(parser, parser.parse_args(["--model", model, *own, *extra]))


@asynccontextmanager
async def make_stage(
    model: str, extra: Sequence[str], seconds: float, ladder: tuple[str, ...]
) -> AsyncIterator[Stage]:
    """Two engines that are up, with an etcd of their own; everything ends with the block."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    start_fork_server()
    config = engine_arguments(model, extra)
    with tempfile.TemporaryDirectory(prefix="llumnix-bench-") as folder:
        embedded = EmbeddedEtcd(Path(folder) / "etcd")
        embedded.start()
        etcd = Etcd(list(embedded.endpoints))
        keys = Keys("bench")
        session = Session(etcd, 6.0)
        session.start()
        actor = Handle(MigrationActor.start(Handshake(etcd, session, keys), 4, 0))
        arguments = {"endpoints": list(embedded.endpoints), "prefix": f"{keys.prefix}{Kind.C10D}/"}
        meet = Rendezvous("llumnix.control.c10d_store.EtcdStore", arguments, "127.0.0.1", ladder)
        exchange = Exchange(NODE, Peers(ThisNode(NODE, "", "bench"), "bench", lambda node: None))
        home = _Home()
        hosted = []
        for slot in range(2):
            name = f"{NODE}-{slot}"
            log = Path(os.environ.get("LLUMNIX_BENCH_LOGS", folder)) / f"{name}.log"
            placement = place(config, slot, 2)
            engine = VllmEngine(name, config, placement, log, Patience(seconds), meet)
            hosted.append(HostedInstance(engine, lambda: home, on_load=lambda: None))
        try:
            await asyncio.gather(*(h.start(on_death=lambda reason: None) for h in hosted))
            exchange.hosted |= {h.id: h for h in hosted}
            rules = Rules(MigrationLimits(within=30.0), "low", Terms())
            view = _view(hosted)
            migrations = Migrations(exchange, actor, lambda: view, rules)
            stage = Stage(exchange, migrations, current_platform.device_name or "CPU")
            home.client = stage.client
            migrations.look()  # as a node's do, whose instances meet before anything moves
            reading = asyncio.create_task(stage.read())
            yield stage
            reading.cancel()
            await migrations.close()
        finally:
            await asyncio.gather(*(h.stop(10.0) for h in hosted))
            await exchange.close()
            actor.stop(5.0)
            session.stop()
            etcd.close()
            embedded.stop()


class _Home:
    """The node's own API server, made after the instances."""

    node = NODE
    client: Any = None

    def deliver(self, frame: Any, stats: Any = None) -> None:
        if self.client is not None:
            self.client.deliver(frame, stats)


def _view(hosted: Sequence[HostedInstance]) -> ClusterView:
    infos = {}
    for one in hosted:
        assert one.facts is not None
        infos[one.id] = InstanceInfo(
            one.id, NODE, "bench", InstanceState.READY, one.facts.total_blocks, one.facts.block_size
        )
    return ClusterView(instances=MappingProxyType(infos))
