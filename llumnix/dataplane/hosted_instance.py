"""One instance as its node hosts it: whose requests its engine runs, and what load that makes.

The engine knows nothing of origins, epochs and positions; they are added to its outputs here,
once for each step. Everything runs on the node's event loop.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import InstanceId, InstanceLoad, NodeId
from llumnix.dataplane.frames import HandOver, Lost, Outputs, Submit
from llumnix.dataplane.hosted_request import NO_RESUME, HostedRequest, Order, Origin
from llumnix.dataplane.instance_load import count_load
from llumnix.engine.base import Death, Engine, EngineDead, EngineError, EngineEvents, EngineFacts

logger = logging.getLogger(__name__)


class HostedInstance:
    """An engine together with the requests it runs and the origins they came from."""

    def __init__(
        self,
        engine: Engine,
        home: Callable[[], Origin | None],
        on_load: Callable[[], None],
        by_priority: bool = False,
    ) -> None:
        """`home`: the API server of this node that gets the engine's statistics, if there is one.
        `on_load`: told of each change of the load, cheaply. `by_priority`: whether the engine's
        queue goes by it."""
        self.engine = engine
        self.id: InstanceId = engine.id
        self.facts: EngineFacts | None = None
        self.life = uuid.uuid4().hex[:8]  # of this engine; another one has the id after a restart
        self.order = Order(by_priority)  # in which its requests run, and wait
        self.gone: str | None = None  # why nothing runs here any more
        self._on_load = on_load
        self._home = home
        self._by_id: dict[str, HostedRequest] = {}
        self._by_name: dict[str, HostedRequest] = {}  # that the engine knows them by
        self._received: dict[Origin, int] = {}  # the highest sequence number of each
        # Who waits for a request that is to come.
        self._expected: dict[asyncio.Future[HostedRequest | None], str] = {}
        self._usage = 0.0
        self._preemptions = 0

    @property
    def requests(self) -> list[HostedRequest]:
        """The requests it has, running or queued, in the order in which they came."""
        return list(self._by_name.values())

    def find(self, request_id: str) -> HostedRequest | None:
        """The request of that id, if it is here."""
        return self._by_id.get(request_id)

    async def start(self, on_death: Callable[[str], None]) -> EngineFacts:
        """Bring the engine up; `on_death` hears why if it dies. Raises EngineError."""

        def died(death: Death) -> None:
            self.gone = death.reason
            self._lose_all(death.reason, death)
            on_death(death.reason)

        self.facts = await self.engine.start(EngineEvents(self._on_outputs, died))
        return self.facts

    async def stop(self, timeout: float) -> None:
        """End the engine; what it still runs is given back to its origins first."""
        self.gone = self.gone or f"instance {self.id} has stopped"
        self._lose_all(self.gone)
        await self.engine.stop(timeout)

    async def submit(self, origin: Origin, frame: Submit) -> None:
        """Give a request to the engine. What cannot run here is answered with a Lost frame.

        The engine knows each epoch of a request under a name of its own: what is left of an
        earlier one, such as a step that was under way, is not taken for an output of this one.
        """
        request_id = frame.request.request_id
        self._received[origin] = max(frame.sequence, self._received.get(origin, 0))
        if self.facts is None or self.gone is not None:
            self._lose(origin, frame.epoch, request_id, self.gone or "it is not up yet")
            return
        if frame.generated and not self.facts.resumes:
            self._lose(origin, frame.epoch, request_id, f"{self.id}: {NO_RESUME}")
            return
        former = self.find(request_id)
        if former is not None and former.origin.node != origin.node:
            reason = f"a request {request_id} of another node runs at {self.id}"
            self._lose(origin, frame.epoch, request_id, reason, retry=False)
            return
        if former is not None and former.epoch >= frame.epoch:
            return  # an echo: its origin has sent it again meanwhile, over another link
        name = request_id if frame.epoch <= 1 else f"{request_id}~{frame.epoch}"
        coming = HostedRequest.of(name, origin, frame, self.facts.block_size)
        self._by_id[request_id] = self._by_name[name] = coming
        self.order.add(coming)
        self._resolve(request_id, coming)
        try:
            if former is not None:
                self._remove(former)
                await self.engine.abort([former.name])
            request = msgspec.structs.replace(frame.request, request_id=name)
            await self.engine.add(request, frame.generated)
            if name not in self._by_name and self.gone is None:  # cancelled meanwhile
                await self.engine.abort([name])
        except EngineError as error:
            self._refuse(coming, str(error), retry=isinstance(error, EngineDead))
        except Exception as error:  # whatever it is, its origin must not wait for ever
            logger.exception("instance %s cannot take request %r", self.id, request_id)
            reason = f"the request can't be given to an engine: {type(error).__name__}: {error}"
            self._refuse(coming, reason, retry=False)
        self._on_load()

    def expect(self, request_id: str) -> "asyncio.Future[HostedRequest | None]":
        """What becomes of a request that is to come: it is here, or None as it never will be."""
        future: asyncio.Future[HostedRequest | None] = asyncio.get_running_loop().create_future()
        self._expected[future] = request_id
        future.add_done_callback(lambda done: self._expected.pop(done, None))
        return future

    def _resolve(self, request_id: str, request: HostedRequest | None) -> None:
        for future in [f for f, expected in self._expected.items() if expected == request_id]:
            if not future.done():
                future.set_result(request)

    async def next_output(self, request: HostedRequest, within: float) -> None:
        """Wait for the next output of a request, or its end. Raises TimeoutError."""
        if not self._has(request):
            return
        if request.watcher is None:
            request.watcher = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(within):
            await asyncio.shield(request.watcher)

    async def hand_over(
        self, requests: Iterable[HostedRequest], destination: InstanceId, node: NodeId
    ) -> list[HostedRequest]:
        """Stop requests here and have their origins resume them there; those that were still here.

        All their outputs have been delivered; what a step under way still samples is dropped.
        """
        gone = [request for request in requests if self._has(request)]
        for request in gone:
            self._remove(request)
            frame = HandOver(self.id, request.epoch, request.request_id, destination, node)
            request.origin.deliver(frame)
        if gone:
            self._on_load()
            await self.engine.abort([request.name for request in gone])
        return gone

    async def cancel(self, request_ids: Iterable[str], epochs: Sequence[int] = ()) -> None:
        """End requests, also those that are still to come; unknown ids are no error.

        With `epochs`, only what runs in that epoch or an earlier one.
        """
        request_ids = list(request_ids)
        if epochs:
            pairs = zip(request_ids, epochs, strict=True)
            request_ids = [i for i, epoch in pairs if (r := self.find(i)) and r.epoch <= epoch]
        else:
            for request_id in request_ids:
                self._resolve(request_id, None)
        known = [found for i in dict.fromkeys(request_ids) if (found := self.find(i)) is not None]
        for request in known:
            self._remove(request)
        if known and self.gone is None:
            await self.engine.abort([request.name for request in known])
        self._on_load()

    async def evict(self, origin: Origin) -> None:
        """End everything that came from an origin which is gone."""
        self._received.pop(origin, None)
        await self.cancel([r.request_id for r in self._by_name.values() if r.origin is origin])

    def load(self) -> InstanceLoad:
        """The load as of the last step, with every request that has arrived since as queued."""
        received: dict[NodeId, int] = {}  # a node may have a former link and a new one
        for origin, sequence in self._received.items():
            received[origin.node] = max(sequence, received.get(origin.node, 0))
        counted = count_load(self.id, self.facts, self._by_name.values(), self.order.queue)
        used = round(self._usage * self.facts.total_blocks) if self.facts and self._by_name else 0
        return replace(counted, used_blocks=used, preemptions=self._preemptions, received=received)

    def _on_outputs(self, step: EngineCoreOutputs) -> None:
        """Split one step by origin and send each its part in one frame."""
        frames: dict[Origin, Outputs] = {}
        going_on: list[HostedRequest] = []
        for output in step.outputs:
            request = self._by_name.get(output.request_id)
            if request is None:  # cancelled while the step ran
                continue
            output.request_id = request.request_id
            frame = frames.get(request.origin)
            if frame is None:
                frame = frames[request.origin] = Outputs(self.id, step.timestamp, [], [], [])
            frame.epochs.append(request.epoch)
            frame.positions.append(request.position)
            frame.outputs.append(output)
            request.position += len(output.new_token_ids)
            request.started = True
            request.wake()  # whoever waits runs after this, and so after the delivery
            if output.events is not None:
                self._take_events(request, output)
            if output.finish_reason is None:
                going_on.append(request)
            else:
                self._remove(request)
        if step.scheduler_stats is not None:
            self.order.step(step.scheduler_stats.num_running_reqs, going_on)
        self._deliver(frames, step)

    def _take_events(self, request: HostedRequest, output: EngineCoreOutput) -> None:
        """Count preemptions. A request that has moved here was queued first elsewhere.

        vLLM's metrics take the last time they hear of as the beginning of its wait, which is over.
        """
        assert output.events is not None
        kinds = [event.type for event in output.events]
        preempted = kinds.count(EngineCoreEventType.PREEMPTED)
        self._preemptions += preempted
        request.preemptions += preempted
        if request.resumed and EngineCoreEventType.QUEUED in kinds:
            output.events = [e for e in output.events if e.type != EngineCoreEventType.QUEUED]

    def _deliver(self, frames: dict[Origin, Outputs], step: EngineCoreOutputs) -> None:
        stats = step.scheduler_stats
        home = self._home() if stats is not None else None
        if stats is not None:
            self._usage = stats.kv_cache_usage
        if home is not None and home not in frames:
            frames[home] = Outputs(self.id, step.timestamp, [], [], [])
        for origin, frame in frames.items():
            origin.deliver(frame, stats if origin is home else None)
        self._on_load()

    def _has(self, request: HostedRequest) -> bool:
        return self._by_name.get(request.name) is request

    def _remove(self, request: HostedRequest) -> None:
        """It is not here any more, in this epoch; the engine may not know yet."""
        del self._by_name[request.name]
        if self._by_id.get(request.request_id) is request:
            del self._by_id[request.request_id]
        self.order.remove(request)
        request.wake()

    def _refuse(self, request: HostedRequest, reason: str, retry: bool) -> None:
        """The engine has not taken a request; one that has ended meanwhile needs no answer."""
        if self._has(request):
            self._remove(request)
            self._lose(request.origin, request.epoch, request.request_id, reason, retry)

    def _lose_all(self, reason: str, death: Death | None = None) -> None:
        requests, self._by_name, self._by_id = self._by_name, {}, {}
        self.order.clear()
        for request_id in set(self._expected.values()):
            self._resolve(request_id, None)
        together = sum(request.on_trial for request in requests.values()) > 1
        at_hand = death.requests if death is not None else ()
        begun = [r for name in at_hand if (r := requests.get(name)) and r.position == r.brought]
        fresh = [request for request in begun if not request.brought]  # not through a step anywhere
        for request in requests.values():
            request.wake()
            ids = [request.epoch], [request.request_id]
            frame = Lost(self.id, *ids, reason, died=death is not None)
            frame.together = together and request.on_trial
            if death is not None and request in begun:
                frame.fault, frame.alone = death.exception, [request] in (begun, fresh)
            request.origin.deliver(frame)
        if self.facts is not None:  # else vLLM's gauges would show its last step until the next one
            idle = EngineCoreOutputs(scheduler_stats=SchedulerStats(), timestamp=time.monotonic())
            self._deliver({}, idle)
        else:
            self._on_load()

    def _lose(
        self, origin: Origin, epoch: int, request_id: str, reason: str, retry: bool = True
    ) -> None:
        origin.deliver(Lost(self.id, [epoch], [request_id], reason, retry))
