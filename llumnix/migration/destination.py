"""The destination's side of live migrations: what the source's node may ask of this one."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llumnix.actors.base import Handle
from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import HostedRequest
from llumnix.engine.base import EngineDead, EngineError, Transfer
from llumnix.migration.actor import MigrationActor, accept_arrival, end_arrival
from llumnix.migration.messages import (
    Accepted,
    Done,
    End,
    Expect,
    Offer,
    Receive,
    Received,
    Reserve,
    Reserved,
    serve,
)
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

LONGEST = 120.0  # seconds; an arrival that nobody has ended by then is given up
FIRST_OUTPUT = 10.0  # seconds from a hand-over to the first output at which blocks stay held


@dataclass(slots=True, eq=False)
class Arrival:
    """One migration on its way here."""

    hosted: HostedInstance
    request_id: str
    source: NodeId
    coming: asyncio.Future[HostedRequest | None]  # the request once it is here, None if it won't be
    timer: asyncio.TimerHandle | None = None  # runs from when it is accepted
    receiving: asyncio.Task[int] | None = None
    ended: bool = False
    moved: bool = True  # whether the request has been handed over, as far as one knows
    lent: bool = False  # whether the source holds blocks that the request will need
    begun: bool = False  # whether it has computed, and no longer needs them


class Arrivals:
    """Takes the destination's steps of all migrations that come to this node's instances."""

    def __init__(
        self,
        exchange: Exchange,
        actor: Handle[MigrationActor],
        at: Callable[[str], Awaitable[None]],
    ) -> None:
        self._exchange = exchange
        self._actor = actor
        self._at = at  # told of each step before it is taken; tests stop a migration there
        self._arrivals: dict[str, Arrival] = {}  # by migration
        self._tasks = TaskSet()
        self._stops = False
        exchange.on_node_lost.append(self._on_node_lost)
        serve(exchange, Offer, self.offer)
        serve(exchange, Reserve, self.reserve)
        serve(exchange, Receive, self.receive)
        serve(exchange, Expect, self.expect)
        serve(exchange, End, self.end)

    def __len__(self) -> int:
        return len(self._arrivals)

    async def offer(self, instance: InstanceId, step: Offer) -> Accepted:
        """Accept or refuse a migration from a node. Raises EngineError."""
        if self._stops:
            raise EngineError(f"node {self._exchange.node} stops")
        hosted = self._exchange.hosted.get(instance)
        if hosted is None:
            raise EngineDead(f"instance {instance} is gone")
        migration, request = step.migration, step.request
        arrival = Arrival(hosted, request, step.source, hosted.expect(request))
        self._arrivals[migration] = arrival
        try:
            await self._at("accept")
            if hosted.gone is not None:
                raise EngineDead(hosted.gone)
            if hosted.facts is None or not hosted.facts.resumes:
                raise EngineError(f"instance {instance} can't resume requests")
            await accept_arrival(self._actor, migration, request, instance, step.blocks)
            if arrival.ended:  # the source has waited long enough
                raise EngineError(f"migration {migration} was ended before it was accepted")
        except BaseException:
            await self._forget(migration, arrival)
            raise
        loop = asyncio.get_running_loop()
        arrival.timer = loop.call_later(LONGEST, self._give_up, migration, arrival)
        return Accepted(hosted.life)

    async def reserve(self, instance: InstanceId, step: Reserve) -> Reserved:
        """Hold room for blocks. Raises EngineError."""
        await self._at("reserve")
        blocks = self._accepted(step.migration).hosted.engine.blocks
        return Reserved(await blocks.reserve(step.migration, step.hashes))

    async def receive(self, instance: InstanceId, step: Receive) -> Received:
        """Receive blocks; returns when requests can use them. Raises EngineError."""
        await self._at("receive")
        migration = step.migration
        arrival = self._accepted(migration)
        blocks = arrival.hosted.engine.blocks
        task = asyncio.ensure_future(blocks.receive(migration, step.transfer))
        arrival.receiving = task
        try:
            return Received(await task)
        except asyncio.CancelledError:
            if not arrival.ended:
                raise  # not the transfer is ended, but who waits for it
            raise EngineError(f"migration {migration} was ended while blocks came") from None
        finally:
            arrival.receiving = None

    async def expect(self, instance: InstanceId, step: Expect) -> Done:
        """Be ready to take what the source lends. Raises EngineError."""
        arrival = self._accepted(step.migration)
        transfer = Transfer(step.pair, step.group, 0, len(step.theirs), 0.0)
        arrival.lent = True  # also where the engine's answer comes too late
        blocks = arrival.hosted.engine.blocks
        await blocks.expect(step.migration, arrival.request_id, transfer, step.theirs)
        return Done()

    async def end(self, instance: InstanceId, step: End) -> Done:
        """Nothing more will come; the blocks stay held until the request uses them, if it moved.

        Where some were lent it returns only then, and raises EngineError if that is not certain.
        """
        arrival = self._arrivals.get(step.migration)
        if arrival is None:
            return Done()
        if not step.moved:
            arrival.moved = False
            if not arrival.coming.done():
                arrival.coming.set_result(None)
        ending = self._finish(step.migration, arrival)
        if not arrival.lent:
            return Done()
        if ending is not None:
            await asyncio.shield(ending)
        if step.moved and not arrival.begun:
            raise EngineError(f"request {arrival.request_id} did not begin")
        return Done()

    async def close(self) -> None:
        """End what waits here, and accept nothing more."""
        self._stops = True
        for arrival in self._arrivals.values():
            arrival.coming.cancel()
            if arrival.timer is not None:
                arrival.timer.cancel()
        await self._tasks.close()

    def _on_node_lost(self, node: NodeId, reason: str) -> None:
        """A source can't end its migrations any more; what it had handed over may still come."""
        for migration, arrival in list(self._arrivals.items()):
            if arrival.source == node:
                self._finish(migration, arrival)

    def _give_up(self, migration: str, arrival: Arrival) -> None:
        logger.warning("migration %s to %s was never ended", migration, arrival.hosted.id)
        self._finish(migration, arrival)

    def _finish(self, migration: str, arrival: Arrival) -> asyncio.Task[None] | None:
        if arrival.ended:
            return None
        arrival.ended = True
        if arrival.timer is None:
            return None  # its offer is being answered, and sees it
        arrival.timer.cancel()
        return self._tasks.spawn(self._end(migration, arrival))

    async def _end(self, migration: str, arrival: Arrival) -> None:
        try:
            if (receiving := arrival.receiving) is not None:
                receiving.cancel()  # nothing may be written once the blocks are given back
                await asyncio.gather(receiving, return_exceptions=True)
            if arrival.moved:
                await self._at("resume")
                await self._first_output(arrival)
            await arrival.hosted.engine.blocks.drop(migration)
        except EngineError as error:
            logger.info("the end of migration %s: %s", migration, error)
        finally:
            await self._forget(migration, arrival)

    async def _first_output(self, arrival: Arrival) -> None:
        """Wait until the request has come and computed something, or it is too late for that."""
        try:
            async with asyncio.timeout(FIRST_OUTPUT):
                request = await arrival.coming
                if request is not None and not request.started:
                    await arrival.hosted.next_output(request, FIRST_OUTPUT)
            # One that ended before may still be on its way into the engine.
            arrival.begun = request is None or request.started
        except TimeoutError:
            logger.info("request %s did not begin at %s", arrival.request_id, arrival.hosted.id)

    async def _forget(self, migration: str, arrival: Arrival) -> None:
        self._arrivals.pop(migration, None)
        arrival.coming.cancel()
        try:
            await end_arrival(self._actor, migration)
        except TimeoutError:  # it has been told, and will hear it
            logger.info("the end of migration %s is not yet in the books", migration)

    def _accepted(self, migration: str) -> Arrival:
        arrival = self._arrivals.get(migration)
        if arrival is None or arrival.timer is None or arrival.ended:
            raise EngineError(f"migration {migration} was not accepted here, or has ended")
        return arrival
