"""The way of a leader's numbers of instances from its manager's thread into etcd."""

import asyncio
import logging
from collections.abc import Callable

from llumnix.control.desired import Wish
from llumnix.control.etcd.errors import EtcdError

logger = logging.getLogger(__name__)


class Wishes:
    """Writes what a manager wishes, without its waiting; a wish that fails is told, and dropped.

    The manager need not hear of it: it looks at what is desired, and wishes again.
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
