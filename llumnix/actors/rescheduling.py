"""The leader's rescheduler on the node's loop: its clock, and the way of its commands."""

import asyncio
import logging

from llumnix.actors.manager import MoveCommand, Outcome
from llumnix.actors.supervised import Supervised
from llumnix.engine.base import EngineError
from llumnix.migration.failures import is_blameless
from llumnix.migration.service import Migrations

logger = logging.getLogger(__name__)


class Rescheduling:
    """Ticks for the manager actor and carries out what it commands, until it is stopped."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, migrations: Migrations, interval: float
    ) -> None:
        self._loop = loop
        self._migrations = migrations
        self._interval = interval  # seconds
        self._manager: Supervised | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, manager: Supervised) -> None:
        """Begin to tick for the manager."""
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
            self._manager.notify("tick")
            self._timer = self._loop.call_later(self._interval, self._tick)

    async def _carry_out(self, command: MoveCommand) -> None:
        try:
            made = await self._migrations.command(
                command.source_node,
                command.source,
                command.destination,
                command.reason,
                epoch=command.epoch,
                rule=command.rule,
                count=command.count,
                blocks=command.blocks,
            )
            outcome = Outcome(requests=made.get("requests", 1), blocks=made.get("blocks"))
        except EngineError as error:
            outcome = Outcome(str(error), is_blameless(error))
        except Exception as error:  # the manager must hear of the end, whatever it is
            logger.exception("a move from %s failed", command.source)
            outcome = Outcome(f"internal error: {type(error).__name__}")
        if self._manager is not None:
            self._manager.notify("finished", command.pair, outcome)
