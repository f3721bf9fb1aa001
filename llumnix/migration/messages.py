"""What the nodes of a migration say to each other: a message for each step, and its reply.

A step travels as a call of the procedure `migration.<name of its class>`, with the message as a
map. What a node does not know in a map it ignores, so fields with a default can be added; a step
whose meaning changes gets a new name, which a node of an older version refuses by one sentence.
"""

from collections.abc import Awaitable, Callable
from math import inf
from typing import Any, Generic, TypeVar, cast, get_args

import msgspec

from llumnix.cluster import InstanceId, NodeId
from llumnix.dataplane.exchange import Exchange
from llumnix.engine.base import EngineError, Transfer
from llumnix.migration.errors import FailureKind, error_of, kind_of

R = TypeVar("R", bound=msgspec.Struct)
S = TypeVar("S", bound="Step[Any]")


class Step(msgspec.Struct, Generic[R], frozen=True):
    """The base of all messages; R is what answers it."""

    @classmethod
    def procedure(cls) -> str:
        """The name by which it is called."""
        return f"migration.{cls.__name__}"

    @classmethod
    def reply(cls) -> type[R]:
        """The class of what answers it."""
        (base,) = cls.__orig_bases__  # type: ignore[attr-defined]
        return cast(type[R], get_args(base)[0])


class Done(msgspec.Struct, frozen=True):
    """The answer where there is nothing to say."""


# ---- to the source, of operators and the leader ----


class Moved(msgspec.Struct, frozen=True):
    """A request has moved, with these numbers of KV blocks and bytes."""

    request: str
    source: InstanceId
    destination: InstanceId
    outcome: str
    seconds: float
    stages: int
    blocks_sent: int
    blocks_skipped: int  # the destination had them
    bytes_sent: int


class MovedTogether(msgspec.Struct, frozen=True):
    """So many requests that waited have moved, which have so many KV blocks."""

    outcome: str
    source: InstanceId
    destination: InstanceId
    requests: int
    blocks: int


class Move(Step[Moved], frozen=True):
    """Move a request, if none is named one that you choose by `rule`."""

    destination: InstanceId
    reason: str
    request: str = ""
    epoch: int = 0  # of the leader that asks; 0: it is no leader
    rule: str = ""  # "": as the source is configured
    blocks: float = inf  # KV blocks at most that it may have at the destination


class MoveWaiting(Step[MovedTogether], frozen=True):
    """Move up to `count` requests that wait, all in one go."""

    destination: InstanceId
    reason: str
    epoch: int
    rule: str
    count: int
    blocks: float = inf  # KV blocks at most that they may have at the destination together


class ListedRequest(msgspec.Struct, frozen=True):
    """A request as operators see it."""

    id: str
    instance: InstanceId
    node: NodeId
    state: str  # running or waiting
    tokens: int
    generated: int
    priority: int
    stuck: str | None  # why it can't move


class Listed(msgspec.Struct, frozen=True):
    """All requests at the instances of a node."""

    requests: list[ListedRequest]


class ListRequests(Step[Listed], frozen=True):
    """List the requests at your instances."""


# ---- from the source to the destination ----


class Accepted(msgspec.Struct, frozen=True):
    """A migration may come."""

    life: str  # of the destination's engine; another one after a restart


class Offer(Step[Accepted], frozen=True):
    """Accept a migration, or refuse it."""

    migration: str
    request: str
    source: NodeId
    blocks: int  # KV blocks that it has now


class Reserved(msgspec.Struct, frozen=True):
    """There is room."""

    present: int  # blocks, from the first on, that the destination has already


class Reserve(Step[Reserved], frozen=True):
    """Hold room for the blocks with these hashes."""

    migration: str
    hashes: list[bytes]


class Received(msgspec.Struct, frozen=True):
    """Blocks have come, and requests can use them."""

    bytes: int


class Receive(Step[Received], frozen=True):
    """Receive blocks from the source's workers."""

    migration: str
    pair: str
    group: str
    first: int
    count: int
    within: float
    skips: int = 0

    @classmethod
    def of(cls, migration: str, transfer: Transfer) -> "Receive":
        """The other end of a transfer."""
        return msgspec.convert({"migration": migration, **msgspec.to_builtins(transfer)}, cls)

    @property
    def transfer(self) -> Transfer:
        """What the destination's engine is to do."""
        return Transfer(self.pair, self.group, self.first, self.count, self.within, self.skips)


class Expect(Step[Done], frozen=True):
    """Be ready to take the blocks that the source lends, when the request comes."""

    migration: str
    pair: str
    group: str
    theirs: list[int]  # the blocks' ids in the source's engine


class End(Step[Done], frozen=True):
    """The migration is over; where blocks were lent, answer when the request has taken them."""

    migration: str
    moved: bool  # whether the request has been handed over


# ---- from one instance to another before anything moves ----


class EngineLife(msgspec.Struct, frozen=True):
    """Which engine an instance has."""

    life: str


class AskLife(Step[EngineLife], frozen=True):
    """Say which engine you have now: another one after a restart."""


class Meet(Step[Done], frozen=True):
    """Make ready for transfers of this pair."""

    pair: str
    group: str
    within: float
    skips: int


# ---- how they travel ----


class Failure(msgspec.Struct, frozen=True):
    """Why a step was not taken."""

    kind: FailureKind
    sentence: str


class Answer(msgspec.Struct, frozen=True):
    """What every call is answered with: a reply, or a failure."""

    reply: Any = None
    failure: Failure | None = None


def serve(
    exchange: Exchange, step: type[S], take: Callable[[InstanceId, S], Awaitable[msgspec.Struct]]
) -> None:
    """Have other nodes, and this one, call a step here."""

    async def procedure(instance: InstanceId, fields: Any) -> Answer:
        try:
            return Answer(await take(instance, _read(fields, step)))
        except EngineError as error:
            return Answer(failure=Failure(kind_of(error), str(error)))

    exchange.procedures[step.procedure()] = procedure


async def ask(
    exchange: Exchange, node: NodeId, instance: InstanceId, step: Step[R], within: float
) -> R:
    """Have a node take a step, in so many seconds. Raises EngineError, TimeoutError."""
    fields = await exchange.call(node, instance, step.procedure(), (step,), within)
    answer = _read(fields, Answer)
    if (failure := answer.failure) is not None:
        raise error_of(failure.kind, failure.sentence)
    return _read(answer.reply, step.reply())


M = TypeVar("M", bound=msgspec.Struct)


def _read(fields: Any, kind: type[M]) -> M:
    """A message of another node, or one of this node, which is as it was made."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise EngineError(f"a {kind.__name__} of another version of llumnix: {error}") from None
