"""Which way KV blocks take between two instances: names of transfer groups, and what has failed.

Instances meet before the first request moves between them, so that it need not wait for that: to
make a way takes from milliseconds (memory of the same machine) to a second (NCCL).
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llumnix.cluster import ClusterView, InstanceId, InstanceInfo, InstanceState
from llumnix.dataplane.exchange import Exchange
from llumnix.dataplane.hosted_instance import HostedInstance
from llumnix.engine.base import EngineError, SetupFailed, Transfer
from llumnix.migration.messages import AskLife, Done, EngineLife, Meet, R, Step, ask, serve

FAILED_SECONDS = 900.0  # until a way that failed may be tried again

MOST = 32  # other instances that each of this node's meets ahead, the others when they need it
WITHIN = 5.0  # seconds for a meeting
MET_SECONDS = 240.0  # until those that have met do so again, which keeps their way from closing
TRIES = 3  # of a meeting that fails, other than for want of a way
PAUSE = 2.0  # seconds between them
SOON = 0.2  # seconds in which more may change at once

Lives = tuple[str, str]  # of the two engines; another one after a restart


@dataclass(slots=True)
class _Pair:
    lives: Lives
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    skips: int = 0  # ways that could not be set up
    until: float = 0.0  # monotonic; when these are tried again


class Groups:
    """The transfer groups from this node's instances to others.

    A group's name is new after a failure, and when one of the two engines has been restarted: the
    other's end of the former group leads nowhere. A way that could not be set up is not tried again
    between the same two engines for a long while, but the next one; with none left the pair has
    none.
    """

    def __init__(self) -> None:
        self._pairs: dict[str, _Pair] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    def name(self, pair: str, lives: Lives) -> str:
        """The group that is in use between two instances, in these lives of their engines."""
        return self._of(pair, lives).name

    def skips(self, pair: str, lives: Lives) -> int:
        """How many ways, from the best on, are not to be tried."""
        return self._of(pair, lives).skips

    def renew(self, pair: str) -> None:
        """Have the next transfer make a new group."""
        if (known := self._pairs.get(pair)) is not None:
            known.name = uuid.uuid4().hex[:12]

    def failed(self, pair: str) -> None:
        """The way that the pair was to take could not be set up: the next one is tried."""
        if (known := self._pairs.get(pair)) is not None:
            known.skips += 1
            known.until = time.monotonic() + FAILED_SECONDS
            self.renew(pair)

    def lock(self, pair: str) -> asyncio.Lock:
        """Held during a transfer: one at a time, or the two ends would disagree on the order."""
        return self._locks.setdefault(pair, asyncio.Lock())

    def forget(self, instance: str) -> None:
        """An instance is gone."""
        for pair in [p for p in self._pairs if instance in p.split("--")]:
            del self._pairs[pair]
            self._locks.pop(pair, None)

    def _of(self, pair: str, lives: Lives) -> _Pair:
        known = self._pairs.get(pair)
        if known is None or known.lives != lives:
            known = self._pairs[pair] = _Pair(lives)
        if known.skips and time.monotonic() > known.until:
            known.skips = 0
        return known


def pair_name(source: str, destination: str) -> str:
    """Names two instances, in this direction."""
    return f"{source}--{destination}"


logger = logging.getLogger(__name__)


class Meetings:
    """Makes a way for KV blocks from each instance of this node to the others, one by one."""

    def __init__(self, exchange: Exchange, groups: Groups, view: Callable[[], ClusterView]) -> None:
        self._exchange = exchange
        self._groups = groups
        self._view = view
        self._met: dict[str, Lives] = {}
        self._failures: dict[str, int] = {}
        self._known: dict[InstanceId, object] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        serve(exchange, AskLife, self._life)
        serve(exchange, Meet, self._meet)

    def look(self) -> None:
        """The view has changed; begins with the first call, and goes by who is up, and where."""
        known: dict[InstanceId, object] = {
            i.id: (i.node, i.model, i.block_size)
            for i in self._view().instances.values()
            if i.state is InstanceState.READY
        }
        if known == self._known and self._task is not None:
            return
        for instance in self._known.keys() - known.keys():
            self._groups.forget(instance)
        self._known = known
        self._failures.clear()
        self._changed.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Make no more instances meet."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            try:
                later = not await self._introduce_all()
            except Exception:  # whatever it is, others are to meet nevertheless
                logger.exception("a meeting failed")
                later = True
            if later:
                await asyncio.sleep(PAUSE)
                continue
            try:
                async with asyncio.timeout(MET_SECONDS):
                    await self._changed.wait()
                await asyncio.sleep(SOON)
            except TimeoutError:
                self._met.clear()

    async def _introduce_all(self) -> bool:
        """Have all meet who have not; False if some are to be tried again."""
        done = True
        pairs = self._pairs(self._view())
        for pair in self._met.keys() - pairs.keys():
            del self._met[pair]
        for pair, (source, destination) in pairs.items():
            done &= await self._introduce(pair, source, destination)
        return done

    def _pairs(self, view: ClusterView) -> dict[str, tuple[HostedInstance, InstanceInfo]]:
        """Whom to introduce: each instance here that is up to the first others of its kind."""
        found: dict[str, tuple[HostedInstance, InstanceInfo]] = {}
        for hosted in list(self._exchange.hosted.values()):
            mine = view.instances.get(hosted.id)
            if mine is None or hosted.facts is None or not hosted.facts.resumes:
                continue
            kind = mine.model, mine.block_size
            others = [
                info
                for _, info in sorted(view.instances.items())
                if info.id != hosted.id
                and info.state is InstanceState.READY
                and (info.model, info.block_size) == kind
            ]
            for info in others[:MOST]:
                found[pair_name(hosted.id, info.id)] = hosted, info
        return found

    async def _introduce(self, pair: str, hosted: HostedInstance, other: InstanceInfo) -> bool:
        """Have two instances meet, unless they have; False if that is to be tried again."""
        failures = self._failures.get(pair, 0)
        if hosted.gone is not None or failures >= TRIES:
            return True
        try:
            lives = hosted.life, (await self._ask(other, AskLife())).life
            if self._met.get(pair) == lives:
                return True
            async with self._groups.lock(pair):
                await self._both(pair, lives, hosted, other)
        except (EngineError, TimeoutError) as error:
            self._failures[pair] = failures + 1
            if failures + 1 == TRIES:
                logger.info("%s and %s do not meet ahead: %s", hosted.id, other.id, error)
            return failures + 1 == TRIES
        self._met[pair] = lives
        self._failures.pop(pair, None)
        return True

    async def _both(
        self, pair: str, lives: Lives, hosted: HostedInstance, other: InstanceInfo
    ) -> None:
        """Try one way after the other, until the two have met or there is no way left."""
        blocks = hosted.engine.blocks
        while (skips := self._groups.skips(pair, lives)) < blocks.ways:
            name = self._groups.name(pair, lives)
            transfer = Transfer(pair, name, 0, 0, WITHIN, skips)
            theirs = self._ask(other, Meet(pair, name, WITHIN, skips))
            met = blocks.meet(transfer, True)
            ends: tuple[Any, Any] = await asyncio.gather(met, theirs, return_exceptions=True)
            failures = [end for end in ends if isinstance(end, BaseException)]
            if not failures:
                return
            if isinstance(ends[0], SetupFailed):
                self._groups.failed(pair)
            else:
                self._groups.renew(pair)
                raise failures[0]
        logger.warning("there is no way for KV blocks from %s to %s", hosted.id, other.id)

    async def _ask(self, other: InstanceInfo, step: Step[R]) -> R:
        return await ask(self._exchange, other.node, other.id, step, WITHIN + 2.0)

    # ---- what other nodes ask ----

    async def _life(self, instance: InstanceId, step: AskLife) -> EngineLife:
        return EngineLife(self._hosted(instance).life)

    async def _meet(self, instance: InstanceId, step: Meet) -> Done:
        transfer = Transfer(step.pair, step.group, 0, 0, step.within, step.skips)
        await self._hosted(instance).engine.blocks.meet(transfer, False)
        return Done()

    def _hosted(self, instance: InstanceId) -> HostedInstance:
        hosted = self._exchange.hosted.get(instance)
        if hosted is None or hosted.facts is None:
            raise EngineError(f"instance {instance} is not up")
        return hosted
