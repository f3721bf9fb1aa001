"""Gets requests to instances: the first time, and again whenever one has lost its instance.

It tries until an instance has taken the request. While there is none it waits: for an instance that
starts, or else for --failover-timeout.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.frames import Cancel, Submit
from llumnix.dataplane.hosted_request import TRIAL_TOKENS
from llumnix.dataplane.interruptions import Interruptions
from llumnix.dataplane.ledger import Entry, Ledger
from llumnix.dataplane.suspects import DEATHS, WAVE_SECONDS, Suspects, is_suspect
from llumnix.dataplane.waiting import WaitingRoom, WaitLimits
from llumnix.engine.base import EngineDead, EngineError

logger = logging.getLogger(__name__)

TRIAL_SECONDS = 10.0  # that others wait for one suspect at most
POLL_SECONDS = 0.02  # between looks at a request on trial


@dataclass(frozen=True, slots=True)
class Route:
    """Where the dispatcher sends a request."""

    instance: InstanceId
    node: NodeId
    sequence: int


class NoInstance(EngineError):
    """No instance of the cluster is ready to take a request."""


class Dispatcher(Protocol):
    """Chooses among the instances of the cluster, and knows which there are."""

    def ready(self) -> Mapping[InstanceId, NodeId]:
        """The instances that take requests, wherever they are."""

    def awaited(self) -> bool:
        """Whether an instance is starting that will take requests when it is up."""

    async def decide(self, tokens: int, priority: int, avoid: frozenset[InstanceId]) -> Route:
        """Choose for a request of so many tokens and this priority, none of those to avoid.

        Raises NoInstance if there is no other.
        """

    def undo(self, route: Route) -> None:
        """Forget a decision that came to nothing."""


class Placer:
    """Gives the requests of a ledger to instances, for one API server; lives on its loop."""

    def __init__(
        self,
        ledger: Ledger,
        exchange: Exchange,
        dispatcher: Dispatcher,
        limits: WaitLimits,
        interruptions: Interruptions,
    ) -> None:
        self._ledger = ledger
        self._exchange = exchange
        self._dispatcher = dispatcher
        self._limits = limits
        self._suspects = Suspects()
        self._waiting = WaitingRoom()
        self._trials = asyncio.Lock()
        self._interruptions = interruptions
        self._nodes: dict[InstanceId, NodeId] = {}  # of every instance that was ever tried
        self.dispatched: Counter[InstanceId] = Counter()

    def instances_changed(self) -> None:
        """Have all requests that wait for an instance look again, the most urgent first."""
        self._waiting.look()

    def suspect(self, instance: InstanceId) -> None:
        """It has lost or refused a request."""
        self._suspects.add([instance])

    def suspect_node(self, node: NodeId) -> None:
        """The connection to it has ended, or it does not answer."""
        self._suspects.add(self._instances_of(node))

    def trust_node(self, node: NodeId) -> None:
        """There is a new connection to it."""
        self._suspects.clear(self._instances_of(node))

    async def place(self, request_id: str, entry: Entry, reason: str = "") -> str | None:
        """Have an instance take the request; why that was not possible, or None.

        Raises EngineError if none can run it. One whose engines died is tried alone: if it is what
        kills them, it takes no other suspect along.
        """
        if not is_suspect(entry):
            return await self._settle(request_id, entry, reason)
        if entry.deaths >= DEATHS:
            # Of engines that die together not all are heard of at once; on the next of them an
            # innocent request would meet its third death.
            await asyncio.sleep(WAVE_SECONDS)
        async with self._turn(entry):
            if self._ledger.get(request_id) is not entry:
                return None  # it has ended while it waited for its trial
            self._interruptions.lost(request_id, anew=True)
            logger.warning(
                "request %s has lost %d engines and is tried alone", request_id, entry.crashes
            )
            failure = await self._settle(request_id, entry, reason)
            if failure is None and await self._passes(request_id, entry):
                entry.clear()
            return failure

    @contextlib.asynccontextmanager
    async def _turn(self, entry: Entry) -> AsyncIterator[None]:
        """A suspect's turn to be tried; one that has lost a single engine waits a moment at most.

        That engine may have died of itself, with many that had just come.
        """
        try:
            async with asyncio.timeout(None if entry.deaths >= DEATHS else TRIAL_SECONDS):
                await self._trials.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            self._trials.release()

    async def give(self, request_id: str, entry: Entry, route: Route, epoch: int) -> str | None:
        """Send a request to its new owner; why that failed, or None. Raises EngineError.

        After a failure nobody owns the request, unless it has ended or was moved on meanwhile.
        """
        if not self._stands(request_id, entry, epoch):
            return None
        tokens = list(entry.tokens)
        suspect = is_suspect(entry)
        frame = Submit(route.instance, epoch, route.sequence, entry.request, tokens, suspect)
        try:
            await self._exchange.submit(route.node, frame)
        except EngineError as error:
            if self._stands(request_id, entry, epoch):
                self._ledger.release(request_id)
            if not isinstance(error, EngineDead):
                raise
            self.suspect_node(route.node)
            return str(error)
        if self._ledger.get(request_id) is not entry or entry.owner != route.instance:
            await self.cancel(route.instance, [request_id])
        return None

    def claim(self, request_id: str, route: Route) -> int:
        """Make an instance the owner of a request; the epoch in which it is."""
        self._nodes[route.instance] = route.node
        return self._ledger.move(request_id, route.instance).epoch

    def learn(self, instance: InstanceId, node: NodeId) -> None:
        """Remember where an instance is, unless that is known."""
        self._nodes.setdefault(instance, node)

    def tried_at(self, node: NodeId) -> list[InstanceId]:
        """The instances of a node that have been given requests."""
        return [instance for instance, where in self._nodes.items() if where == node]

    async def cancel(
        self, instance: InstanceId, request_ids: list[str], epochs: list[int] | None = None
    ) -> None:
        """End requests at an instance, if `epochs` are given only up to those."""
        node = self._nodes.get(instance) or self._dispatcher.ready().get(instance)
        if node is None:
            return
        try:
            await self._exchange.cancel(node, Cancel(instance, request_ids, epochs or []))
        except EngineDead as error:
            logger.info("nothing to cancel at %s: %s", instance, error)

    def _instances_of(self, node: NodeId) -> list[InstanceId]:
        known = {**self._nodes, **self._dispatcher.ready()}
        return [instance for instance, where in known.items() if where == node]

    async def _settle(self, request_id: str, entry: Entry, reason: str) -> str | None:
        wait = self._limits.begin(self._interruptions.since(request_id))
        waited = False
        while self._ledger.get(request_id) is entry:
            epoch = entry.epoch
            route = await self._find(entry, suspects_too=waited)
            if not self._stands(request_id, entry, epoch):  # cancelled meanwhile
                if route is not None:
                    self._dispatcher.undo(route)
                return None
            if route is None and self._dispatcher.awaited():
                wait.go_on(time.monotonic())
            left = wait.left(time.monotonic())
            if left <= 0:
                if route is not None:
                    self._dispatcher.undo(route)
                return f"{wait.sentence}; {reason}" if reason else wait.sentence
            if route is None:
                await self._waiting.wait(entry.request.priority, entry.request.arrival_time, left)
                waited = True
                continue
            waited = False
            failure = await self.give(request_id, entry, route, self.claim(request_id, route))
            if failure is None:
                self.dispatched[route.instance] += 1
                return None
            self._dispatcher.undo(route)
            reason = failure
            logger.warning("could not place request %s: %s", request_id, reason)
            if entry.owner is not None:
                return None  # cancelled, or given to another instance by now
        return None

    async def _find(self, entry: Entry, suspects_too: bool) -> Route | None:
        """An instance for a request: if there is another, none that has lost it before.

        One under suspicion only when nothing else is left, and not at once.
        """
        tokens = len(entry.request.prompt_token_ids or ()) + len(entry.tokens)
        suspects = self._suspects.now()
        choices = [suspects | entry.lost_by, suspects]
        if suspects_too:
            choices += [frozenset(entry.lost_by), frozenset()]
        for avoid in dict.fromkeys(choices):
            with contextlib.suppress(NoInstance):
                return await self._dispatcher.decide(tokens, entry.request.priority, avoid)
        return None

    async def _passes(self, request_id: str, entry: Entry) -> bool:
        """Whether a request on trial generates some tokens, or ends, without its engine dying."""
        if entry.owner is None:  # its engine had died before, and another is looked for
            return False
        epoch, wanted = entry.epoch, len(entry.tokens) + TRIAL_TOKENS
        deadline = time.monotonic() + TRIAL_SECONDS
        while self._stands(request_id, entry, epoch) and time.monotonic() < deadline:
            if len(entry.tokens) >= wanted:
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False

    def _stands(self, request_id: str, entry: Entry, epoch: int) -> bool:
        """Whether a request is still open, and nobody has moved it since that epoch."""
        return self._ledger.get(request_id) is entry and entry.epoch == epoch
