"""The leader's rescheduler on the node's loop: its clock, and the way of its commands."""

import asyncio
import contextlib
import logging
from typing import Any

from pykka import ActorDeadError

from llumnix.actors.manager import MOVED, MoveCommand
from llumnix.engine.base import EngineError
from llumnix.entrypoints.migrations import Migrations

logger = logging.getLogger(__name__)


class Rescheduling:
    """Ticks for the manager actor and carries out what it commands, until it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, migrations: Migrations, interval: float
    ) -> None:
        self._loop = loop
        self._migrations = migrations
        self._interval = interval  # seconds
        self._manager: Any = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, manager: Any) -> None:
        """Begin to tick for the manager, given by its proxy."""
        self._manager = manager
        self._timer = self._loop.call_later(self._interval, self._tick)

    def stop(self) -> None:
        """Tell the manager no more."""
        self._manager = None
        if self._timer is not None:
            self._timer.cancel()

    def command(self, command: MoveCommand) -> None:
        """Have a source move a request, as this node leads; called on the manager's thread."""
        asyncio.run_coroutine_threadsafe(self._carry_out(command), self._loop)

    def _tick(self) -> None:
        if self._manager is not None:
            with contextlib.suppress(ActorDeadError):  # it is being started again
                self._manager.tick.defer()
            self._timer = self._loop.call_later(self._interval, self._tick)

    async def _carry_out(self, command: MoveCommand) -> None:
        try:
            await self._migrations.command(
                command.source_node,
                command.source,
                command.destination,
                command.reason,
                epoch=command.epoch,
            )
            outcome = MOVED
        except EngineError as error:
            outcome = str(error)
        except Exception as error:  # the manager must hear of the end, whatever it is
            logger.exception("a move from %s failed", command.source)
            outcome = f"internal error: {type(error).__name__}"
        if self._manager is not None:
            with contextlib.suppress(ActorDeadError):
                self._manager.finished.defer(command.pair, outcome)
