"""The actor that admits migrations from and to this node's instances, and records each step.

The only actor that does blocking I/O: it keeps the migrations' records in etcd. While etcd is
silent no migration begins, and one that has not committed is given up.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pykka import ActorDeadError

from llumnix.actors.base import Actor, Handle
from llumnix.cluster import InstanceId
from llumnix.control.etcd.errors import EtcdError, EtcdOutcomeUnknown
from llumnix.engine.base import EngineError
from llumnix.migration.errors import FailureKind, MigrationError
from llumnix.migration.record import (
    Handshake,
    HandshakeError,
    MigrationRecord,
    MigrationState,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES, PAUSE = 10, 0.1  # and the seconds between them: in one an actor that has died is back


@dataclass(frozen=True, slots=True)
class Plan:
    """A migration that was admitted."""

    request: str
    source: InstanceId
    destination: InstanceId
    blocks: int


@dataclass
class Books:
    """The migrations of a node, by their ids; they outlive the actor."""

    leaving: dict[str, Plan] = field(default_factory=dict)
    coming: dict[str, Plan] = field(default_factory=dict)
    # Departures that are over, while their records stay.
    ending: dict[str, Plan] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)  # a late proposal may yet be written


class MigrationActor(Actor):
    """Admits migrations within their limits, and takes each through its handshake."""

    def __init__(
        self,
        handshake: Handshake,
        requests_limit: int,
        blocks_limit: int,
        books: Books | None = None,
    ) -> None:
        super().__init__()
        self._handshake = handshake
        self._requests_limit = requests_limit  # at a time, out of and into each instance
        self._blocks_limit = blocks_limit  # KV blocks of these together; 0: any number
        self._books = books if books is not None else Books()

    def propose(self, record: MigrationRecord, blocks: int) -> None:
        """Admit a departure and write its record. Raises MigrationError to refuse.

        Whatever the answer is, or if none comes, `ended` is to be called in the end.
        """
        leaving = [plan for plan in self._books.leaving.values() if plan.source == record.source]
        self._admit(leaving, blocks, f"leave instance {record.source}")
        plan = Plan(record.request, record.source, record.destination, blocks)
        self._books.leaving[record.migration] = plan
        try:
            self._ask_etcd(lambda: self._handshake.propose(record))
        except MigrationError as error:
            if isinstance(error.__cause__, EtcdOutcomeUnknown):
                self._books.doubtful.add(record.migration)
            raise

    def accept(self, migration: str, request: str, instance: InstanceId, blocks: int) -> None:
        """Admit an arrival and say so in its record. Raises MigrationError to refuse.

        Whatever the answer is, or if none comes, `departed` is to be called in the end.
        """
        coming = [plan for plan in self._books.coming.values() if plan.destination == instance]
        self._admit(coming, blocks, f"come to instance {instance}")
        record = self._ask_etcd(
            lambda: self._handshake.advance(
                request, migration, MigrationState.PROPOSED, MigrationState.ACCEPTED
            )
        )
        plan = Plan(request, record.source, record.destination, blocks)
        self._books.coming[migration] = plan

    def advance(self, migration: str, state: MigrationState) -> None:
        """Take a departure to its next state: copying, or committed. Raises MigrationError."""
        plan = self._books.leaving[migration]
        before = {
            MigrationState.COPYING: MigrationState.ACCEPTED,
            MigrationState.COMMITTED: MigrationState.COPYING,
        }[state]
        self._ask_etcd(lambda: self._handshake.advance(plan.request, migration, before, state))

    def ended(self, migration: str, failure: str | None) -> bool:
        """A departure is over, and its record goes; whether it is certainly gone.

        If not, because etcd is silent, this is to be called again.
        """
        if (plan := self._books.leaving.pop(migration, None)) is not None:
            self._books.ending[migration] = plan
        plan = self._books.ending.get(migration)
        if plan is None:
            return True
        try:
            if failure is not None:
                self._handshake.abort(plan.request, migration, failure)
            self._handshake.remove(plan.request, migration)
        except HandshakeError as error:
            logger.warning("the record of migration %s is not touched: %s", migration, error)
        except EtcdError as error:
            logger.warning("the record of migration %s stays for now: %s", migration, error)
            return False
        if migration in self._books.doubtful:
            self._books.doubtful.remove(migration)
            return False
        del self._books.ending[migration]
        return True

    def departed(self, migration: str) -> None:
        """An arrival is over, with or without the request."""
        self._books.coming.pop(migration, None)

    def sweep(self, record: MigrationRecord) -> None:
        """Remove a record of this node that belongs to no migration (any more).

        It was written late, by a member of etcd that had been frozen.
        """
        known = self._books.leaving.keys() | self._books.ending.keys()
        if record.migration in known:
            return
        try:
            self._handshake.remove(record.request, record.migration)
        except EtcdError as error:
            logger.warning("a stray record of %s ends with the lease: %s", record.request, error)

    def under_way(self) -> Counter[str]:
        """How many migrations are under way from and to this node's instances."""
        return Counter(out=len(self._books.leaving)) + Counter({"in": len(self._books.coming)})

    def _admit(self, plans: list[Plan], blocks: int, move: str) -> None:
        if len(plans) >= self._requests_limit:
            raise MigrationError(f"{len(plans)} requests {move} already", FailureKind.NO_ROOM)
        total = sum(plan.blocks for plan in plans) + blocks
        if plans and 0 < self._blocks_limit < total:
            raise MigrationError(f"{total} KV blocks would {move} at once", FailureKind.NO_ROOM)

    def _ask_etcd(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except HandshakeError as error:
            raise MigrationError(str(error)) from error
        except EtcdError as error:
            raise MigrationError(f"etcd does not answer: {error}") from error


async def accept_arrival(
    actor: Handle[MigrationActor], migration: str, request: str, instance: InstanceId, blocks: int
) -> None:
    """Have an arrival admitted and its record taken to accepted. Raises EngineError to refuse."""
    try:
        await actor.ask(MigrationActor.accept, migration, request, instance, blocks)
    except ActorDeadError as error:
        raise EngineError("this node stops, or its books are being opened again") from error


async def end_arrival(actor: Handle[MigrationActor], migration: str) -> None:
    """Say that an arrival is over, to a successor if the actor has just died.

    When this node stops there is none, and its lease takes the record along.
    """
    for _ in range(TRIES):
        with contextlib.suppress(ActorDeadError):  # its successor has the same books
            await actor.ask(MigrationActor.departed, migration)
            return
        await asyncio.sleep(PAUSE)
