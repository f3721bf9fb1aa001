"""Writes the numbers of instances that a leader wants into etcd, off its manager's thread."""

import asyncio
import logging
from collections.abc import Callable

from llumnix.control.desired import Wish
from llumnix.control.etcd.errors import EtcdError

logger = logging.getLogger(__name__)


class Wishes:
    """Writes a manager's wishes while it goes on; one that can't be written is logged and dropped.

    The manager need not hear of that: it sees what is desired, and wishes again.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, put_desired: Callable[[Wish], None]
    ) -> None:
        self._loop = loop
        self._put_desired = put_desired  # blocks, as long as etcd's client tries

    def make(self, wish: Wish) -> None:
        """Have a wish written, as this node leads; called on the manager's thread."""
        asyncio.run_coroutine_threadsafe(self._write(wish), self._loop)

    async def _write(self, wish: Wish) -> None:
        try:
            await asyncio.to_thread(self._put_desired, wish)
        except EtcdError as error:
            logger.warning("epoch %d: the number of instances stays: %s", wish.epoch, error)
        except Exception:  # nobody else would hear of it
            logger.exception("epoch %d: the number of instances stays", wish.epoch)
