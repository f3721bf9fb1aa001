"""One instance as its node hosts it: whose requests its engine runs, and what load that makes.

The engine knows nothing of origins, epochs and positions; they are added to its outputs here,
once for each step. Everything runs on the node's event loop.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest

import msgspec
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs

from llumnix.cluster import InstanceId, InstanceLoad, NodeId, kv_blocks
from llumnix.dataplane.batch_order import Order
from llumnix.dataplane.frames import HandOver, Lost, Outputs, Submit
from llumnix.dataplane.hosted_request import Origin, Tenant
from llumnix.dataplane.resumability import NO_RESUME, why_pinned
from llumnix.engine.base import Engine, EngineDead, EngineError, EngineEvents, EngineFacts

logger = logging.getLogger(__name__)

PRIORITIES = 64  # that a load report counts by number, the most frequent ones


class HostedInstance:
    """An engine together with the requests it runs and the origins they came from."""

    def __init__(
        self,
        engine: Engine,
        slot: int,
        home: Origin,
        on_load: Callable[[], None],
        by_priority: bool = False,
    ) -> None:
        """`home`: the API server of this node, which gets the engine's statistics. `on_load`: told
        of each change of the load, cheaply. `by_priority`: whether the engine's queue goes by it.
        """
        self.engine = engine
        self.slot = slot  # 0, 1, … on this node; the `engine` label of vLLM's own metrics
        self.facts: EngineFacts | None = None
        self.life = uuid.uuid4().hex[:8]  # of this engine; another one has the id after a restart
        self.order = Order(by_priority)  # in which they run, and wait
        self._on_load = on_load
        self._home = home
        self._tenants: dict[str, Tenant] = {}  # by the id that the engine knows them by
        self._names: dict[str, str] = {}  # request id → that id
        self._received: dict[Origin, int] = {}  # the highest sequence number of each
        self._expected: dict[asyncio.Future[Tenant | None], str] = {}  # who waits for a request
        self._usage = 0.0
        self._preemptions = 0
        self._dead: str | None = None

    @property
    def id(self) -> InstanceId:
        """The instance's name in the cluster."""
        return self.engine.id

    @property
    def gone(self) -> str | None:
        """Why nothing runs here any more; None while the engine is alive."""
        return self._dead

    @property
    def requests(self) -> int:
        """How many requests the instance has, running or queued."""
        return len(self._tenants)

    @property
    def tenants(self) -> list[Tenant]:
        """The requests it has, in the order in which they came."""
        return list(self._tenants.values())

    def find(self, request_id: str) -> Tenant | None:
        """The request of that id, if it is here."""
        name = self._names.get(request_id)
        return self._tenants[name] if name is not None else None

    async def start(self, on_death: Callable[[str], None]) -> EngineFacts:
        """Bring the engine up; `on_death` hears why if it dies. Raises EngineError."""

        def died(reason: str) -> None:
            self._dead = reason
            self._lose_all(reason, died=True)
            on_death(reason)

        self.facts = await self.engine.start(EngineEvents(self._on_outputs, died))
        return self.facts

    async def stop(self, timeout: float) -> None:
        """End the engine; what it still runs is given back to its origins first."""
        if self._dead is None:
            self._dead = f"instance {self.id} has stopped"
        self._lose_all(self._dead)
        await self.engine.stop(timeout)

    async def submit(self, origin: Origin, frame: Submit) -> None:
        """Give a request to the engine. What cannot run here is answered with a Lost frame.

        The engine knows each epoch of a request under a name of its own: what is left of an
        earlier one, such as a step that was under way, is not taken for an output of this one.
        """
        request_id = frame.request.request_id
        self._received[origin] = max(frame.sequence, self._received.get(origin, 0))
        if self.facts is None or self._dead is not None:
            self._lose(origin, frame.epoch, request_id, self._dead or "it is not up yet")
            return
        if frame.generated and not self.facts.resumes:
            self._lose(origin, frame.epoch, request_id, f"{self.id}: {NO_RESUME}")
            return
        former = self._names.get(request_id)
        if former is not None and self._tenants[former].origin.node != origin.node:
            reason = f"a request {request_id} of another node runs at {self.id}"
            self._lose(origin, frame.epoch, request_id, reason, retry=False)
            return
        if former is not None and self._tenants[former].epoch >= frame.epoch:
            return  # an echo: its origin has sent it again meanwhile, over another link
        name = request_id if frame.epoch <= 1 else f"{request_id}~{frame.epoch}"
        self._names[request_id] = name
        self._tenants[name] = tenant = self._tenant(name, origin, frame)
        self.order.add(tenant)
        self._resolve(request_id, tenant)
        try:
            if former is not None:
                if (old := self._take_out(former)) is not None:
                    old.wake()
                await self.engine.abort([former])
            request = msgspec.structs.replace(frame.request, request_id=name)
            await self.engine.add(request, frame.generated)
            if name not in self._tenants and self._dead is None:  # cancelled meanwhile
                await self.engine.abort([name])
        except EngineError as error:
            self._refuse(name, str(error), retry=isinstance(error, EngineDead))
        except Exception as error:  # whatever it is, its origin must not wait for ever
            logger.exception("instance %s cannot take request %r", self.id, request_id)
            reason = f"the request can't be given to an engine: {type(error).__name__}: {error}"
            self._refuse(name, reason, retry=False)
        self._on_load()

    def _tenant(self, name: str, origin: Origin, frame: Submit) -> Tenant:
        assert self.facts is not None
        request, generated = frame.request, len(frame.generated)
        prompt = len(request.prompt_token_ids or ())
        return Tenant(
            request_id=request.request_id,
            name=name,
            origin=origin,
            epoch=frame.epoch,
            prompt=prompt,
            position=generated,
            brought=generated,
            suspect=frame.suspect,
            blocks=kv_blocks(prompt + generated, self.facts.block_size),
            priority=request.priority,
            arrived=request.arrival_time,
            pinned=why_pinned(request),
        )

    def expect(self, request_id: str) -> "asyncio.Future[Tenant | None]":
        """What becomes of a request that is to come: it is here, or None as it never will be."""
        future: asyncio.Future[Tenant | None] = asyncio.get_running_loop().create_future()
        self._expected[future] = request_id
        future.add_done_callback(lambda done: self._expected.pop(done, None))
        return future

    def _resolve(self, request_id: str, tenant: Tenant | None) -> None:
        for future in [f for f, expected in self._expected.items() if expected == request_id]:
            if not future.done():
                future.set_result(tenant)

    async def next_output(self, tenant: Tenant, within: float) -> None:
        """Wait for the next output of a request, or its end. Raises TimeoutError."""
        if self._tenants.get(tenant.name) is not tenant:
            return
        if tenant.watcher is None:
            tenant.watcher = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(within):
            await asyncio.shield(tenant.watcher)

    async def hand_over(self, tenant: Tenant, destination: InstanceId, node: NodeId) -> bool:
        """Stop a request here and have its origin resume it there; False if it has ended already.

        All its outputs have been delivered; what a step under way still samples is dropped.
        """
        return bool(await self.hand_over_all([tenant], destination, node))

    async def hand_over_all(
        self, tenants: Iterable[Tenant], destination: InstanceId, node: NodeId
    ) -> list[Tenant]:
        """Likewise, many in one go; those that were still here, and are not any more."""
        gone = [t for t in tenants if self._tenants.get(t.name) is t]
        for tenant in gone:
            self._take_out(tenant.name)
            del self._names[tenant.request_id]
            tenant.wake()
            frame = HandOver(self.id, tenant.epoch, tenant.request_id, destination, node)
            tenant.origin.deliver(frame)
        if gone:
            self._on_load()
            await self.engine.abort([tenant.name for tenant in gone])
        return gone

    async def cancel(self, request_ids: Iterable[str], epochs: Sequence[int] = ()) -> None:
        """End requests, also those that are still to come; unknown ids are no error.

        With `epochs`, only what runs in that epoch or an earlier one.
        """
        if epochs:
            pairs = zip(request_ids, epochs, strict=True)
            request_ids = [i for i, epoch in pairs if (t := self.find(i)) and t.epoch <= epoch]
        else:
            request_ids = list(request_ids)
            for request_id in request_ids:
                self._resolve(request_id, None)
        known = [name for i in request_ids if (name := self._names.pop(i, None)) is not None]
        for name in known:
            if (tenant := self._take_out(name)) is not None:
                tenant.wake()
        if known and self._dead is None:
            await self.engine.abort(known)
        self._on_load()

    async def evict(self, origin: Origin) -> None:
        """End everything that came from an origin which is gone."""
        self._received.pop(origin, None)
        await self.cancel([t.request_id for t in self._tenants.values() if t.origin is origin])

    def load(self) -> InstanceLoad:
        """The load as of the last step, with every request that has arrived since as queued."""
        queue = self.order.queue
        prefill = 0
        priorities: dict[int, int] = {}
        for tenant in self._tenants.values():
            if not tenant.started:
                prefill += tenant.tokens
            if tenant.priority:
                priorities[tenant.priority] = priorities.get(tenant.priority, 0) + 1
        total = self.facts.total_blocks if self.facts else 0
        busy = bool(self._tenants)
        received: dict[NodeId, int] = {}  # a node may have a former link and a new one
        for origin, sequence in self._received.items():
            received[origin.node] = max(sequence, received.get(origin.node, 0))
        return InstanceLoad(
            self.id,
            running=len(self._tenants) - len(queue),
            waiting=len(queue),
            used_blocks=round(self._usage * total) if busy else 0,
            waiting_blocks=sum(map(self._asks, queue)),
            head_blocks=self._asks(queue[0]) if queue else 0,
            prefill_tokens=prefill,
            preempted=sum(tenant.started for tenant in queue),
            preemptions=self._preemptions,
            # Clients choose the numbers; a report must not grow with them.
            priorities=dict(nlargest(PRIORITIES, priorities.items(), key=lambda item: item[1])),
            received=received,
        )

    def _asks(self, tenant: Tenant) -> int:
        """KV blocks that a request asks for to run, or to run again."""
        if not tenant.started:
            return tenant.blocks
        assert self.facts is not None
        return kv_blocks(tenant.tokens, self.facts.block_size)

    def _on_outputs(self, step: EngineCoreOutputs) -> None:
        """Split one step by origin and send each its part in one frame."""
        frames: dict[Origin, Outputs] = {}
        awakened: list[Tenant] = []
        going_on: list[Tenant] = []
        tenants = self._tenants
        for output in step.outputs:
            name = output.request_id
            tenant = tenants.get(name)
            if tenant is None:  # cancelled while the step ran
                continue
            output.request_id = tenant.request_id
            frame = frames.get(tenant.origin)
            if frame is None:
                frame = frames[tenant.origin] = Outputs(self.id, step.timestamp, [], [], [])
            frame.epochs.append(tenant.epoch)
            frame.positions.append(tenant.position)
            frame.outputs.append(output)
            tenant.position += len(output.new_token_ids)
            tenant.started = True
            if tenant.watcher is not None:
                awakened.append(tenant)
            if output.events is not None:
                self._take_events(tenant, output)
            if output.finish_reason is None:
                going_on.append(tenant)
            else:
                self._take_out(name)
                del self._names[tenant.request_id]
        if step.scheduler_stats is not None:
            self.order.step(step.scheduler_stats.num_running_reqs, going_on)
        self._deliver(frames, step)
        for tenant in awakened:
            tenant.wake()

    def _take_events(self, tenant: Tenant, output: EngineCoreOutput) -> None:
        """Count preemptions. A request that has moved here was queued first elsewhere.

        vLLM's metrics take the last time they hear of as the beginning of its wait, which is over.
        """
        assert output.events is not None
        kinds = [event.type for event in output.events]
        preempted = kinds.count(EngineCoreEventType.PREEMPTED)
        self._preemptions += preempted
        tenant.preemptions += preempted
        if tenant.resumed and EngineCoreEventType.QUEUED in kinds:
            output.events = [e for e in output.events if e.type != EngineCoreEventType.QUEUED]

    def _deliver(self, frames: dict[Origin, Outputs], step: EngineCoreOutputs) -> None:
        stats = step.scheduler_stats
        if stats is not None:
            self._usage = stats.kv_cache_usage
            if self._home not in frames:
                frames[self._home] = Outputs(self.id, step.timestamp, [], [], [])
        for origin, frame in frames.items():
            origin.deliver(frame, stats if origin is self._home else None)
        self._on_load()

    def _take_out(self, name: str) -> Tenant | None:
        """It is not here any more; the engine may not know yet."""
        tenant = self._tenants.pop(name, None)
        if tenant is not None:
            self.order.remove(tenant)
        return tenant

    def _refuse(self, name: str, reason: str, retry: bool) -> None:
        """The engine has not taken a request; one that has ended meanwhile needs no answer."""
        tenant = self._take_out(name)
        if tenant is not None:
            del self._names[tenant.request_id]
            tenant.wake()
            self._lose(tenant.origin, tenant.epoch, tenant.request_id, reason, retry)

    def _lose_all(self, reason: str, died: bool = False) -> None:
        tenants, self._tenants, self._names = self._tenants, {}, {}
        self.order.clear()
        for request_id in set(self._expected.values()):
            self._resolve(request_id, None)
        together = sum(tenant.on_trial for tenant in tenants.values()) > 1
        for tenant in tenants.values():
            tenant.wake()
            ids = [tenant.epoch], [tenant.request_id]
            unsure = together and tenant.on_trial
            tenant.origin.deliver(Lost(self.id, *ids, reason, died=died, together=unsure))

    def _lose(
        self,
        origin: Origin,
        epoch: int,
        request_id: str,
        reason: str,
        retry: bool = True,
    ) -> None:
        origin.deliver(Lost(self.id, [epoch], [request_id], reason, retry))
