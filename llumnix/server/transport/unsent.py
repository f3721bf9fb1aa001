"""What a client has not taken yet of its answers, and how long it may take for that."""

import asyncio
import logging

from llumnix.metrics import CLOSED
from llumnix.server.transport.connection_places import Limits

logger = logging.getLogger(__name__)

PARTING = 1.0  # seconds for a client to close as well; TLS would wait half a minute for that


class Unsent:
    """The deadline of one connection.

    It is long for one whose caller is known. A stranger gets answers too, with which he could keep
    a connection for as long, and has no more time for them than for a request's head.
    """

    __slots__ = ("_limits", "_timer", "known", "wire")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self.known = False  # whether the request, or the last one, has shown who has sent it
        self.wire: asyncio.Transport | None = None

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self.wire.get_write_buffer_size() if self.wire is not None else 0

    def expect(self) -> None:
        """Have the client take it, or be cut off."""
        if self._timer is None and (patience := self._patience):
            self._timer = asyncio.get_running_loop().call_later(patience, self._cut_off)

    def part(self) -> None:
        """Have the client take it, or close as well if there is nothing to take."""
        self.settle()
        if self.size:
            self.expect()
        else:
            self._timer = asyncio.get_running_loop().call_later(PARTING, self._hang_up)

    def settle(self) -> None:
        """It has been taken."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def begin(self, full: bool) -> None:
        """Another request has come, whose caller is not known yet; `full`: the send buffer is."""
        if self._timer is not None and not full and (self.known or not self.size):
            self.settle()
        self.known = False

    def vouch(self) -> None:
        """Its caller is known."""
        self.known = True
        if self._timer is not None:
            self.settle()
            if self.size:
                self.expect()

    @property
    def _patience(self) -> float:
        """Seconds for which the client may read nothing of its answer; 0: for ever."""
        long, short = self._limits.send_timeout, self._limits.header_timeout
        return long if self.known or 0 < long < short else short

    def _cut_off(self) -> None:
        if self.wire is None or not self.size:
            self._timer = None
            return
        CLOSED.labels("stuck").inc()
        logger.info(
            "client %s is cut off: it has read nothing of its answer for %g s",
            *(self.wire.get_extra_info("peername"), self._patience),
        )
        self._hang_up()

    def _hang_up(self) -> None:
        self._timer = None
        if self.wire is not None:
            self.wire.abort()  # close() would wait for what it does not read
