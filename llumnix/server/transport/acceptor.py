"""Takes new connections a few at a time, so that a thousand at once do not hold the loop up.

asyncio's servers, and uvloop's, accept all that wait before anything else is done again: for a
thousand, those that have a stream get no token for a tenth of a second. And they give up no
descriptor to handshakes that never end, of which nothing above them knows.
"""

import asyncio
import logging
import os
import socket
import ssl
from collections.abc import Callable

from llumnix.metrics import CLOSED
from llumnix.server.transport.connection import Connection
from llumnix.server.transport.log_throttle import Seldom
from llumnix.server.transport.tls_handshakes import Handshakes
from llumnix.tasks import TaskSet

logger = logging.getLogger(__name__)

AT_ONCE = 16  # connections that are accepted in one turn of the loop
GREETING = 256  # TLS handshakes under way; beyond them the oldest is given up
GIVE_WAY = 0.002  # seconds in which another process may take a connection in this one's place
PAUSE = 0.1  # seconds for which none is accepted when there is no descriptor for it


class Acceptor:
    """Listens on sockets that are bound, and makes a protocol for each connection."""

    def __init__(
        self,
        make: Callable[[], Connection],
        context: ssl.SSLContext | None,
        handshake_timeout: float,
        gives_way: Callable[[], bool] = lambda: False,
    ) -> None:
        """`gives_way`: whether another process, which listens on the same sockets, is to have the
        next connection if it takes it: the first to wake up would have them all."""
        self._gives_way = gives_way
        self._make = make
        self._handshakes = Handshakes(context, handshake_timeout) if context is not None else None
        self._sockets: list[socket.socket] = []
        self._greeting = TaskSet()
        self._poor = Seldom(logger, "no descriptor for a new connection (%d times)")

    def listen(self, server: asyncio.AbstractServer, backlog: int) -> None:
        """Accept what comes to the sockets of a server that does not serve itself."""
        for bound in getattr(server, "sockets", ()):
            listening = socket.socket(fileno=os.dup(bound.fileno()))
            listening.setblocking(False)
            listening.listen(backlog)
            self._sockets.append(listening)
            self._watch(listening)

    def refuse_new(self) -> None:
        """Listen no more; what has been accepted goes on."""
        for listening in self._sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
            listening.close()
        self._sockets.clear()

    async def close(self) -> None:
        """End the handshakes too."""
        self.refuse_new()
        if self._handshakes is not None:  # else they are over at once
            self._greeting.cancel()
        await self._greeting.wait()

    def _watch(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            loop = asyncio.get_running_loop()
            loop.add_reader(listening.fileno(), self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        if self._gives_way():
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening.fileno())
            loop.call_later(GIVE_WAY, self._take, listening)
        else:
            self._take_all(listening)

    def _take(self, listening: socket.socket) -> None:
        """Take what nobody else has taken meanwhile, and go on."""
        if listening in self._sockets:
            self._watch(listening)
            self._take_all(listening)

    def _take_all(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(AT_ONCE):
            try:
                accepted, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor, or no memory: the next one would fail as well
                self._poor.count()
                loop.remove_reader(listening.fileno())
                loop.call_later(PAUSE, self._watch, listening)
                return
            accepted.setblocking(False)
            self._greeting.spawn(self._greet(accepted))
            if self._handshakes is not None and len(self._greeting) > GREETING:
                CLOSED.labels("handshake").inc()
                self._greeting.drop_oldest()

    async def _greet(self, accepted: socket.socket) -> None:
        try:
            if self._handshakes is not None:
                await self._handshakes.greet(accepted, self._make)
            else:
                await asyncio.get_running_loop().connect_accepted_socket(self._make, accepted)
        except OSError as error:  # TLS that is none, or a client that has left
            logger.debug("a connection could not be made: %s", error)
