"""The engine-core client over the cluster: to vLLM's frontend, all instances are one engine.

It stands where vLLM's own data-parallel client stands. A request is dispatched to an instance,
entered into the ledger, and whatever comes back passes the ledger before the frontend sees it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from types import SimpleNamespace

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.metrics.stats import SchedulerStats

from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.exchange import Cancels, Exchange
from llumnix.dataplane.frames import HandOver, Lost, News
from llumnix.dataplane.hosted_request import NO_RESUME, why_pinned
from llumnix.dataplane.interruptions import Interruptions
from llumnix.dataplane.ledger import Acceptance, Entry, Ledger
from llumnix.dataplane.peer_link import Link
from llumnix.dataplane.placer import Dispatcher, Placer, Route
from llumnix.dataplane.prompt_logprobs import PromptLogprobs
from llumnix.dataplane.suspects import DeathWave, is_given_up
from llumnix.dataplane.utility_calls import UtilityCalls
from llumnix.dataplane.waiting import WaitLimits
from llumnix.engine.base import EngineError
from llumnix.late import Late
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

# What becomes of outputs behind which a request runs that has another owner, or none.
_DISOWNED = (Acceptance.STALE, Acceptance.UNKNOWN)


# Told of a request that has to end: its id, one sentence, and the status that fits, 400 if no
# engine can run it, 500 if it is not to be sent again, 503 if it may be.
OnFailure = Callable[[str, str, HTTPStatus], None]


class ClusterClient(UtilityCalls):
    """vLLM's `EngineCoreClient` over all instances of the cluster, for one API server."""

    def __init__(
        self,
        exchange: Exchange,
        dispatcher: Dispatcher,
        slots: int,
        limits: WaitLimits | None = None,
        resumes: bool = True,
        interruptions: Interruptions | None = None,
        on_open: Sequence[Callable[[EngineCoreRequest], None]] = (),
        on_close: Sequence[Callable[[str], None]] = (),
    ) -> None:
        """`resumes`: whether the engines can go on with a request that has begun. `on_open`: called
        for each request of the frontend, in its handler's context, in this order; `on_close`: with
        the id of each of them once it has ended, however it has."""
        super().__init__(exchange)
        # Which AsyncLLM asks: no single engine's death is the end.
        self.resources = SimpleNamespace(engine_dead=False)
        # One engine label for each slot of this node in vLLM's metrics, the last for other nodes.
        self.engine_ranks_managed = list(range(slots + 1))
        self.node: NodeId = exchange.node
        self.ledger = Ledger()
        self.interruptions = interruptions or Interruptions()
        self._elsewhere = slots
        self._resumes = resumes
        self._dispatcher = dispatcher
        self.placer = Placer(
            self.ledger, exchange, dispatcher, limits or WaitLimits(), self.interruptions
        )
        self._wave = DeathWave()
        self._cancels = Cancels(self.placer.cancel)
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._tasks = TaskSet()
        self.prompt_logprobs = PromptLogprobs(self._tasks, self._pass_on_outputs)
        self._on_open = on_open
        self._on_close = on_close
        self._on_failure: Late[OnFailure] = Late("frontend")
        exchange.bind(self)

    def bind(self, on_failure: OnFailure) -> None:
        """Have the frontend that stands above this client told of requests that have to end."""
        self._on_failure.bind(on_failure)

    @property
    def instances(self) -> Mapping[InstanceId, NodeId]:
        """The instances that are ready, wherever they are."""
        return self._dispatcher.ready()

    # ---- what vLLM's frontend calls ----

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Take a request. It is dispatched in a task: the frontend can't undo a half-made call.

        Raises ValueError if a request of that id is open already.
        """
        if request.lora_request is not None:
            request.lora_request = self._adapters.shared(request.lora_request)
        self.ledger.open(request.request_id, request)
        if getattr(request, "abort_immediately", False):  # which newer versions of vLLM have
            self._tasks.spawn(self._pass_on(request.request_id))
            return
        for call in self._on_open:
            call(request)
        self._tasks.spawn(self._place(request.request_id))

    async def _pass_on(self, request_id: str) -> None:
        """Show an engine's KV connector a request that was refused; no output will end it."""
        await self._place(request_id)
        await self.abort_requests_async([request_id])

    async def get_output_async(self) -> EngineCoreOutputs:
        """The next batch of accepted outputs, or an instance's statistics."""
        return await self._outputs.get()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """End requests wherever they run; a node that is gone has ended them already."""
        if (sending := self.end(request_ids)) is not None:
            await asyncio.shield(sending)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to end here: engines and links have other owners."""
        self._tasks.cancel()

    def dp_engines_running(self) -> bool:
        """Whether any request is open."""
        return bool(len(self.ledger))

    def end(self, request_ids: list[str]) -> asyncio.Task[None] | None:
        """Likewise, at once; a task that is done when their engines have been told, if any are."""
        ended = [(i, entry) for i in request_ids if (entry := self._close(i)) is not None]
        owned = [(entry.owner, i) for i, entry in ended if entry.owner is not None]
        return self._cancels.add(owned) if owned else None

    # ---- what comes back ----

    def deliver(self, frame: News, stats: SchedulerStats | None = None) -> None:
        """Take a frame from an instance: pass on what the ledger accepts."""
        if isinstance(frame, Lost):
            for request_id, epoch in zip(frame.request_ids, frame.epochs, strict=True):
                self._lost(request_id, epoch, frame)
            return
        if isinstance(frame, HandOver):
            self._hand_over(frame)
            return
        accepted = []
        interrupted = self.interruptions.any
        unwanted: list[tuple[str, int]] = []
        for output, epoch, position in zip(
            frame.outputs, frame.epochs, frame.positions, strict=True
        ):
            request_id = output.request_id
            verdict = self.ledger.accept(request_id, epoch, position, output.new_token_ids)
            if verdict is Acceptance.ACCEPTED:
                accepted.append(output)
                if interrupted:
                    self.interruptions.answered(request_id, position)
                if output.finish_reason is not None:
                    self._close(request_id)
            elif verdict in _DISOWNED:
                unwanted.append((request_id, epoch))
        if unwanted:  # an orphan is behind them: end it where it runs
            ids, epochs = map(list, zip(*unwanted, strict=True))
            self._tasks.spawn(self.placer.cancel(frame.instance, ids, epochs))
        if accepted or stats is not None:
            slot = self._exchange.slot(frame.instance)
            here = slot is not None
            timestamp = frame.timestamp if here else _in_our_time(accepted, frame.timestamp)
            engine = self._elsewhere if slot is None else slot
            hold = self.prompt_logprobs.hold
            at_once = [output for output in accepted if not hold(output, engine, timestamp)]
            self._pass_on_outputs(at_once, engine, timestamp, stats)

    def _pass_on_outputs(
        self,
        outputs: list[EngineCoreOutput],
        engine: int,
        timestamp: float,
        stats: SchedulerStats | None = None,
    ) -> None:
        self._outputs.put_nowait(
            EngineCoreOutputs(
                engine_index=engine, outputs=outputs, scheduler_stats=stats, timestamp=timestamp
            )
        )

    # ---- placing and replacing ----

    def node_found(self, link: Link) -> None:
        """There is a new connection to a node."""
        self.placer.trust_node(link.node)

    async def _place(self, request_id: str, reason: str = "") -> None:
        """Send a request to an instance; whatever goes wrong, its client hears of it."""
        entry = self.ledger.get(request_id)
        if entry is None:
            return
        status = HTTPStatus.SERVICE_UNAVAILABLE
        try:
            failure = await self.placer.place(request_id, entry, reason)
        except EngineError as error:  # nor will another try help
            failure, status = str(error), HTTPStatus.BAD_REQUEST
        except Exception as error:
            logger.exception("request %s could not be placed", request_id)
            failure = f"internal error: {type(error).__name__}"
        if failure is not None:
            self._fail(request_id, failure, status)

    def _hand_over(self, frame: HandOver) -> None:
        """An owner has stopped a request for another instance to go on with it."""
        request_id = frame.request_id
        entry = self.ledger.get(request_id)
        if entry is not None and entry.epoch == frame.epoch and entry.owner == frame.instance:
            route = Route(frame.destination, frame.node, 0)
            epoch = self.placer.claim(request_id, route)
            self.interruptions.moved(request_id, epoch)
            self._tasks.spawn(self._resume_at(request_id, entry, route, epoch))
            return
        self.ledger.dropped[Acceptance.STALE] += 1
        if entry is None or entry.owner != frame.destination:  # which waits for it in vain
            self.placer.learn(frame.destination, frame.node)
            self._tasks.spawn(self.placer.cancel(frame.destination, [request_id]))

    async def _resume_at(self, request_id: str, entry: Entry, route: Route, epoch: int) -> None:
        """Resume a request where its former owner wants it, or else wherever it can."""
        try:
            failure = await self.placer.give(request_id, entry, route, epoch)
        except EngineError as error:  # it can't be sent there
            failure = str(error)
        if failure is not None and entry.owner is None and self.ledger.get(request_id) is entry:
            logger.warning("request %s could not move: %s", request_id, failure)
            await self._place(request_id, failure)

    def node_lost(self, node: NodeId, reason: str) -> None:
        """All that ran at a node goes on elsewhere."""
        self.placer.suspect_node(node)
        for instance in self.placer.tried_at(node):
            for request_id, entry in self.ledger.owned_by(instance):
                self.interruptions.found(request_id)
                self._lost(request_id, entry.epoch, Lost(instance, [], [], reason))

    def _lost(self, request_id: str, epoch: int, lost: Lost) -> None:
        """An owner lost a request: it goes on elsewhere, from the tokens that were accepted.

        One that has moved there and not begun has met no death, but a refusal: somewhere it ran.
        """
        if lost.retry:
            self.placer.suspect(lost.instance)
        if lost.died:
            self._wave.add(lost.instance)
        entry = self.ledger.get(request_id)
        if entry is None or entry.epoch != epoch or entry.owner is None:
            return
        came = self.interruptions.moves_to(request_id, epoch)
        died = lost.died and not came
        if died:
            self._wave.blame(entry, lost)
        reason, pinned = lost.reason, None
        if entry.tokens:
            pinned = why_pinned(entry.request) if self._resumes else NO_RESUME
        if pinned is not None:
            self._fail(request_id, f"{reason}; the request can't go on elsewhere: {pinned}")
        elif not (lost.retry or came or entry.tokens):
            self._fail(request_id, reason, HTTPStatus.BAD_REQUEST)
        elif is_given_up(entry):
            self._fail(
                request_id,
                f"request {request_id} is given up, as {entry.crashes} engines died while they "
                f"ran it: {reason}",
                HTTPStatus.INTERNAL_SERVER_ERROR,
            )
        else:
            logger.warning(
                "request %s goes on elsewhere at token %d: %s", request_id, entry.position, reason
            )
            # One that was refused has looked for an instance since its last loss.
            self.interruptions.lost(request_id, anew=died)
            self.ledger.release(request_id)
            self._tasks.spawn(self._place(request_id, reason))

    def _close(self, request_id: str) -> Entry | None:
        self.interruptions.ended(request_id)
        entry = self.ledger.close(request_id)
        if entry is not None:
            for call in self._on_close:
                call(request_id)
        return entry

    def _fail(
        self, request_id: str, reason: str, status: HTTPStatus = HTTPStatus.SERVICE_UNAVAILABLE
    ) -> None:
        if self._close(request_id) is not None:
            logger.error("request %s ended: %s", request_id, reason)
            self._on_failure()(request_id, reason, status)


def _in_our_time(outputs: list[EngineCoreOutput], timestamp: float) -> float:
    """Move the events of a step on another machine, whose clock began elsewhere, to ours.

    Returns the step's time on our clock (monotonic seconds): what its frame took on the way is not
    known, and counts as none.
    """
    now = time.monotonic()
    for output in outputs:
        for event in output.events or ():
            event.timestamp += now - timestamp
    return now
