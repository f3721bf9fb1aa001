"""The clock of the leader's manager, and who carries out its commands; on the node's loop."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from llumnix.actors.base import Handle
from llumnix.actors.manager import ManagerActor, MoveCommand, Outcome
from llumnix.control.desired import Wish
from llumnix.control.etcd.errors import EtcdError

logger = logging.getLogger(__name__)


class Rescheduling:
    """Ticks for the manager actor and carries out what it commands, until it is stopped."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        move: Callable[[MoveCommand], Awaitable[Outcome]],
        put_desired: Callable[[Wish], None],
        interval: float,
    ) -> None:
        self._loop = loop
        self._move = move  # has the source do it, and tells what came of it
        self._put_desired = put_desired  # blocks, as long as etcd's client tries
        self._interval = interval  # seconds
        self._manager: Handle[ManagerActor] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, manager: Handle[ManagerActor]) -> None:
        """Begin to tick for the manager."""
        self._manager = manager
        self._timer = self._loop.call_later(self._interval, self._tick)

    def stop(self) -> None:
        """Stop ticking, and tell the manager of no further outcome."""
        self._manager = None
        if self._timer is not None:
            self._timer.cancel()

    def command(self, command: MoveCommand) -> None:
        """Have a source move a request, as this node leads; called on the manager's thread."""
        asyncio.run_coroutine_threadsafe(self._carry_out(command), self._loop)

    def wish(self, wish: Wish) -> None:
        """Have numbers of instances written, as this node leads; called on the manager's thread.

        What can't be written is logged and dropped: the manager sees what is desired, and wishes
        again.
        """
        asyncio.run_coroutine_threadsafe(self._write(wish), self._loop)

    def _tick(self) -> None:
        if self._manager is not None:
            self._manager.notify(ManagerActor.tick)
            self._timer = self._loop.call_later(self._interval, self._tick)

    async def _write(self, wish: Wish) -> None:
        try:
            await asyncio.to_thread(self._put_desired, wish)
        except EtcdError as error:
            logger.warning("epoch %d: the number of instances stays: %s", wish.epoch, error)
        except Exception:  # nobody else would hear of it
            logger.exception("epoch %d: the number of instances stays", wish.epoch)

    async def _carry_out(self, command: MoveCommand) -> None:
        try:
            outcome = await self._move(command)
        except Exception as error:  # the manager must hear of the end, whatever it is
            logger.exception("a move from %s failed", command.source)
            outcome = Outcome(f"internal error: {type(error).__name__}")
        if self._manager is not None:
            self._manager.notify(ManagerActor.finished, command.pair, outcome)
