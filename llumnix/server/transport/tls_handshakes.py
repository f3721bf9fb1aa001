"""TLS handshakes, a few in each turn of the loop: each costs a signature, about a millisecond.

asyncio, and uvloop, answer whatever has come at once: hundreds of clients that begin in the same
moment would hold the loop for hundreds of milliseconds. So what comes before a handshake is over
waits here for its turn, whichever of its messages it is, a part of one or several of them: a client
that is asked for another ClientHello costs the signature with that one.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

from llumnix.loop_turns import Turns
from llumnix.server.transport.connection import Connection
from llumnix.server.transport.tls_records import PIECE, Records, Slices, feed

AT_ONCE = 4  # times in one turn of the loop that something of a handshake is taken


class Handshakes:
    """Makes connections of sockets whose clients are to speak TLS."""

    def __init__(self, context: ssl.SSLContext, timeout: float) -> None:
        """`timeout`: seconds for a handshake, with all its waiting."""
        self._context = context
        self._timeout = timeout
        self._turns = Turns(AT_ONCE)
        self._slices = Slices()

    async def greet(self, accepted: Any, make: Callable[[], Connection]) -> None:
        """Have the client of this socket shake hands, and a protocol made for it.

        Raises OSError if it does not; the socket is closed then, and also when this is cancelled.
        """
        loop = asyncio.get_running_loop()
        gate, early = _Gate(self._turns), _Early()
        wire, _ = await loop.connect_accepted_socket(lambda: gate, accepted)
        try:
            # start_tls puts TLS in the gate's place before it waits; the gate steps before it then.
            loop.call_soon(gate.step_before_tls)
            tls = await loop.start_tls(
                *(wire, early, self._context),
                server_side=True,
                ssl_handshake_timeout=self._timeout,
            )
        except BaseException:
            wire.abort()
            raise
        if tls is None or early.lost:
            wire.abort()
            return
        served = make()
        early.give_way(tls, served)
        gate.step_aside(lambda shaken: Records(wire, shaken, tls, served, self._slices))


class _Gate(asyncio.Protocol):
    """Between a socket and its TLS, until a handshake is over: has what comes wait for a turn."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._wire: Any = None
        self._tls: Any = None
        self._held = b""
        self._waits = self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket has a transport."""
        self._wire = transport

    def step_before_tls(self) -> None:
        """TLS has taken the gate's place, and shall have the one behind it."""
        self._tls = self._wire.get_protocol()
        self._wire.set_protocol(self)
        asyncio.get_running_loop().call_soon(self._wait)  # behind TLS's own beginning

    def step_aside(self, make: Callable[[Any], asyncio.Protocol]) -> None:
        """The handshake is over: what is made for its TLS has this place, and what is left."""
        if self._wire.is_closing():
            return
        held, self._held = self._held, b""
        ended, self._ended = self._ended, False
        waited, self._waits = self._waits, False
        after = make(self._tls)
        self._wire.set_protocol(after)
        if waited:
            self._wire.resume_reading()
        if held:
            after.data_received(held)
        if ended and not after.eof_received():
            self._wire.close()

    def data_received(self, data: bytes) -> None:
        """Something has come; nothing else is read before its turn."""
        self._held += data
        self._wire.pause_reading()
        self._wait()

    def eof_received(self) -> bool | None:
        """The client has closed its side, which is told in its order."""
        self._ended = True
        self._wait()
        return True

    def pause_writing(self) -> None:
        """The send buffer is full."""
        if self._tls is not None:
            self._tls.pause_writing()

    def resume_writing(self) -> None:
        """It has room again."""
        if self._tls is not None:
            self._tls.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing left to shake."""
        self._held, self._ended = b"", False
        if self._tls is not None:
            self._tls.connection_lost(exc)

    def _wait(self) -> None:
        if self._tls is None or self._waits or not (self._held or self._ended):
            return
        self._waits = True
        self._turns.call(self._take)

    def _take(self) -> None:
        """Have TLS take what is here."""
        held, self._held = self._held[:PIECE], self._held[PIECE:]
        feed(self._tls, held)
        waited, self._waits = self._waits, False
        if self._held:
            self._wait()
            return
        ended, self._ended = self._ended, False
        if ended and not self._tls.eof_received():
            self._wire.close()
        if waited and not self._wire.is_closing():
            self._wire.resume_reading()


class _Early(asyncio.Protocol):
    """Keeps what a client sends right behind its handshake, until its protocol is there."""

    def __init__(self) -> None:
        self._data = b""
        self._ended = False
        self.lost = False

    def data_received(self, data: bytes) -> None:
        """The beginning of a request, most likely."""
        self._data += data

    def eof_received(self) -> None:
        """The client has closed its side."""
        self._ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        self.lost = True

    def give_way(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """Have the client's protocol go on from here."""
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if self._data:
            protocol.data_received(self._data)
        if self._ended and not protocol.eof_received():
            transport.close()
