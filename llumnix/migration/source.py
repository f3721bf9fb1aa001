"""The source's side of one live migration, from the proposal to the hand-over or the abort.

The request goes on decoding while its full KV blocks travel, stage by stage; then it stops at the
end of a step, and its API server resumes it at the destination. Whatever goes wrong before that,
the request has never stopped. What goes wrong after it is the API server's to mend, which resumes
the request wherever it can.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from llumnix.actors.base import Handle
from llumnix.cluster import NodeId, kv_blocks
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.dataplane.hosted_request import HostedRequest
from llumnix.engine.base import LEND_SECONDS, EngineDead, EngineError, SetupFailed, Transfer
from llumnix.migration.actor import MigrationActor
from llumnix.migration.errors import Ended, MigrationError
from llumnix.migration.messages import End, Expect, Move, Offer, R, Receive, Reserve, Step, ask
from llumnix.migration.record import MigrationRecord, MigrationState
from llumnix.migration.transfer_groups import Groups, pair_name

logger = logging.getLogger(__name__)

GRACE = 2.0  # seconds beyond a transfer's own deadline until it is given up without an answer
# Seconds for which lent blocks stay held when nobody says that they were taken: longer than they
# may be taken, and a step that takes them may last.
LENT_SECONDS = 4 * LEND_SECONDS
# Of a block, that a request must have before it to be lent: it goes on while that is arranged.
MARGIN = 4  # tokens
RECOMPUTED_MOST = 8192  # tokens of a request that moves to where none of its blocks can go


@dataclass(frozen=True, slots=True)
class MigrationLimits:
    """How a migration proceeds."""

    max_stages: int = 3
    last_stage_max_blocks: int = 4  # full blocks that the destination may have to recompute
    tail_tokens: int = 4  # beyond full blocks, likewise; a request is stopped where it has few
    within: float = 10.0  # seconds for each answer of the destination, and each transfer


@dataclass(slots=True)
class Progress:
    """What a migration has done; the material of its metrics."""

    stages: int = 0
    blocks_sent: int = 0
    blocks_skipped: int = 0  # the destination had them
    bytes_sent: int = 0
    bytes_skipped: int = 0


@dataclass(slots=True, eq=False)
class Departure:
    """One request on its way from an instance of this node to another instance."""

    migration: str
    source: HostedInstance
    request: HostedRequest
    step: Move  # as it was asked for
    node: NodeId  # of the destination
    exchange: Exchange
    actor: Handle[MigrationActor]
    groups: Groups
    limits: MigrationLimits
    at: Callable[[str], Awaitable[None]]  # told of each step; tests stop a migration there
    progress: Progress = field(default_factory=Progress)
    _life: str = ""  # of the destination's engine
    _covered: int = 0  # blocks that are at the destination
    _lent: bool = False  # whether the destination may read blocks here when the request comes
    _preemptions: int = 0  # of the request, when they were lent

    async def propose(self) -> None:
        """Have the migration admitted and recorded. Raises MigrationError."""
        await self.at("propose")
        record = MigrationRecord(
            self.request.request_id,
            self.source.id,
            self.step.destination,
            self.request.epoch,
            reason=self.step.reason,
            migration=self.migration,
        )
        blocks = kv_blocks(self.request.tokens, self.block_size)
        await self.actor.ask(MigrationActor.propose, record, blocks)

    async def run(self) -> None:
        """Move the request. Raises MigrationError, after which it goes on where it was.

        Ended if it has come to its end meanwhile.
        """
        handed_over = False
        try:
            await self.at("offer")
            blocks = kv_blocks(self.request.tokens, self.block_size)
            who = (self.migration, self.request.request_id, self.exchange.node)
            self._life = (await self._ask(Offer(*who, blocks))).life
            await self.at("copy")
            await self.actor.ask(MigrationActor.advance, self.migration, MigrationState.COPYING)
            await self._copy()
            await self.at("commit")
            self._check()
            await self.actor.ask(MigrationActor.advance, self.migration, MigrationState.COMMITTED)
            await self.at("hand over")
            await self._lend()
            await self._hand_over()
            handed_over = True
        except TimeoutError as error:
            raise MigrationError(f"{self.step.destination} did not answer in time") from error
        finally:
            await self._release(handed_over)

    async def _copy(self) -> None:
        """Send full blocks while the request decodes, until few of its tokens are left."""
        size = self.block_size
        for stage in range(1, self.limits.max_stages + 1):
            async with asyncio.timeout(self.limits.within):
                engine = self.source.engine
                hashes = await engine.blocks.export(self.migration, self.request.name)
            self._check()
            if not hashes:
                return  # these blocks can't move: the destination computes them anew
            if fresh := hashes[self._covered :]:
                if not self._has_way():
                    return  # likewise
                await self.at(f"stage {stage}")
                await self._send(fresh)
                self.progress.stages = stage
            left = self.request.tokens - self._covered * size
            if left <= self.limits.tail_tokens or not self.request.started:
                return
            reads = self.source.engine.blocks.reads(self._pair)
            if reads and left // size <= self.limits.last_stage_max_blocks:
                return  # what is left is lent
            if stage < self.limits.max_stages and not reads:
                await self._until_block_full()
        left_blocks = (self.request.tokens - self._covered * size) // size
        if left_blocks > self.limits.last_stage_max_blocks:
            raise MigrationError(
                f"after {self.limits.max_stages} stages {left_blocks} blocks are left to copy"
            )

    @property
    def block_size(self) -> int:
        """Tokens in a KV block of the source."""
        facts = self.source.facts
        if facts is None:
            raise Ended(f"instance {self.source.id} is gone")
        return facts.block_size

    def _has_way(self) -> bool:
        """Whether blocks can go from here to there at all. Raises MigrationError if none should."""
        if self.groups.skips(self._pair, self._lives) < self.source.engine.blocks.ways:
            return True
        if self.request.tokens > RECOMPUTED_MOST and self.step.reason != "drain":
            between = f"between {self.source.id} and {self.step.destination}"
            raise MigrationError(
                f"there is no way for KV blocks {between}, "
                f"and {self.request.tokens} tokens are too many to be computed anew"
            )
        return False

    @property
    def _pair(self) -> str:
        return pair_name(self.source.id, self.step.destination)

    @property
    def _lives(self) -> tuple[str, str]:
        return self.source.life, self._life

    async def _lend(self) -> None:
        """Where the destination reads this engine's memory, show it what is behind the full blocks.

        It takes them at the moment when it needs them, and has nothing to compute anew but the last
        token. If that can't be arranged, the request moves nevertheless.
        """
        blocks, size = self.source.engine.blocks, self.block_size
        if not self.request.started or not blocks.reads(self._pair):
            return
        while 0 < -self.request.tokens % size < MARGIN:
            await self._next_output()
        name = self.groups.name(self._pair, self._lives)
        self._preemptions = self.request.preemptions
        try:
            async with asyncio.timeout(self.limits.within):
                theirs = await blocks.lend(self.migration, self.request.name)
            self._lent = True
            await self._ask(Expect(self.migration, self._pair, name, theirs))
        except (EngineError, TimeoutError) as error:
            # Without an answer it may be that the destination goes by it nevertheless.
            self._lent &= isinstance(error, EngineDead | TimeoutError)
            logger.info("request %s takes no blocks along: %s", self.request.request_id, error)

    async def _until_block_full(self) -> None:
        """Wait for the block that the request is filling: less is left to recompute then.

        Its KV is complete one step after its last token was sampled. One that fills up too slowly
        is not waited for any longer; a request that makes no progress at all is an error.
        """
        size = self.block_size
        target = (self.request.tokens // size + (self.request.tokens % size > 0)) * size + 1
        deadline = time.monotonic() + self.limits.within
        while self.request.tokens < target and time.monotonic() < deadline:
            await self._next_output()

    async def _send(self, fresh: list[bytes]) -> None:
        """One stage: the blocks with these hashes, as far as the destination has them not."""
        async with self.groups.lock(self._pair):
            present = (await self._ask(Reserve(self.migration, fresh))).present
            count = len(fresh) - present
            if count:
                await self._transfer(self._covered + present, count)
        self._covered += len(fresh)
        self.progress.blocks_skipped += present
        self.progress.bytes_skipped += present * self.source.engine.blocks.block_bytes
        self.progress.blocks_sent += count

    async def _transfer(self, first: int, count: int) -> None:
        within = self.limits.within
        name = self.groups.name(self._pair, self._lives)
        skips = self.groups.skips(self._pair, self._lives)
        transfer = Transfer(self._pair, name, first, count, within, skips)
        send = self.source.engine.blocks.send(self.migration, transfer)
        receive = self._ask(Receive.of(self.migration, transfer), within + GRACE)
        both = asyncio.ensure_future(send), asyncio.ensure_future(receive)
        try:
            async with asyncio.timeout(within + GRACE):
                sent, _ = await asyncio.gather(*both)
        except BaseException as error:
            self.groups.renew(self._pair)
            if isinstance(error, SetupFailed):
                self.groups.failed(self._pair)
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            raise
        self.progress.bytes_sent += sent

    async def _hand_over(self) -> None:
        if self.request.started:
            # Right behind an output no step's work is lost but the one that has just begun.
            await self._next_output()
        self._check()
        if self._lent and self.request.preemptions != self._preemptions:
            # What was lent is not where the request has computed since.
            raise MigrationError(f"request {self.request.request_id} was preempted")
        if not await self.source.hand_over([self.request], self.step.destination, self.node):
            raise Ended(f"request {self.request.request_id} has ended")

    async def _next_output(self) -> None:
        within = self.limits.within
        try:
            await self.source.next_output(self.request, within)
        except TimeoutError:
            raise MigrationError(f"the request made no progress for {within:.1f} s") from None
        self._check()

    def _check(self) -> None:
        if self.source.find(self.request.request_id) is not self.request:
            raise Ended(f"request {self.request.request_id} has ended")
        if (why := self.request.stuck) is not None:  # it has begun meanwhile
            raise MigrationError(f"request {self.request.request_id} can't move: {why}")

    async def _release(self, handed_over: bool) -> None:
        """Neither side holds blocks any more; a side that is gone holds none anyway."""
        works: list[Awaitable[Any]]
        if self._lent:
            works = [self._taken(handed_over)]
        else:
            works = [
                self.source.engine.blocks.drop(self.migration),
                self._ask(End(self.migration, handed_over)),
            ]
        # To its end, even if this migration is cancelled meanwhile.
        both = asyncio.gather(*works, return_exceptions=True)
        done, _ = await asyncio.wait([both], timeout=self.limits.within + GRACE)
        for error in both.result() if done else ["it takes too long"]:
            if error is not None:
                logger.info("the end of migration %s: %s", self.migration, error)

    async def _taken(self, handed_over: bool) -> None:
        """Hold what was lent until the request computes elsewhere, or can't take it any more."""
        try:
            await self._ask(End(self.migration, handed_over))
        except (EngineError, TimeoutError) as error:
            logger.info("the end of migration %s is not known: %s", self.migration, error)
            await asyncio.sleep(LENT_SECONDS)
        await self.source.engine.blocks.drop(self.migration)

    async def _ask(self, step: Step[R], within: float | None = None) -> R:
        where = self.exchange, self.node, self.step.destination
        return await ask(*where, step, within or self.limits.within)
