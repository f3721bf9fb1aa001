"""What comes on a TLS connection after its handshake, of which not all need be anybody's data.

A client may have its keys changed with each record of TLS 1.3, also before it has asked for
anything: 27 bytes, for which a server computes 30 microseconds, so that 250 kB of them hold the
loop for 0.3 s. OpenSSL has no limit. So a connection may have brought little that is no data.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from llumnix.metrics import CLOSED
from llumnix.server.transport.connection import Connection

# Bytes without data that a connection may bring at once: one of the largest records, before its end
# has come, and a few hundred small ones.
EMPTY = 20 * 1024
EMPTY_RATE = 2048  # and in each second: pings, and records of a few bytes
PIECE = 4096  # bytes that TLS takes in one go
SLICE = 0.003  # seconds in one turn of the loop for what comes on all connections


class Slices:
    """Does what is asked for at once, until a turn of the loop has taken too long; then later."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._spent = 0.0
        self._next: asyncio.Handle | None = None

    def call(self, work: Callable[[], None]) -> None:
        """Do it now or in one of the next turns."""
        if self._next is None:
            self._next = asyncio.get_running_loop().call_soon(self._go_on)
        if self._waiting or self._spent >= SLICE:
            self._waiting.append(work)
        else:
            self._do(work)

    def _do(self, work: Callable[[], None]) -> None:
        began = time.perf_counter()
        work()
        self._spent += time.perf_counter() - began

    def _go_on(self) -> None:
        self._next, self._spent = None, 0.0
        if self._waiting:
            self._next = asyncio.get_running_loop().call_soon(self._go_on)
        while self._waiting and self._spent < SLICE:
            self._do(self._waiting.popleft())


class Records(asyncio.Protocol):
    """Between a socket and its TLS: has what comes wait for a turn, and ends what brings no data.

    The socket is paused meanwhile, unless TLS might do that itself: where its reader has paused
    and it only keeps what comes.
    """

    def __init__(
        self, wire: Any, tls: Any, inner: asyncio.Transport, served: Connection, slices: Slices
    ) -> None:
        """`wire`: the socket's transport; `tls`: its protocol; `inner`: TLS's, to `served`."""
        self._wire, self._tls, self._inner, self._served = wire, tls, inner, served
        self._slices = slices
        self._held = b""
        self._waits = self._paused = self._ended = False
        self._empty = 0.0  # bytes that have brought nothing yet
        self._received = served.received
        self._looked = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Some records, or parts of them."""
        self._held += data
        if self._waits:
            return
        if not self._inner.is_reading():
            self._take()
            return
        self._waits = True
        self._slices.call(self._take)
        if self._waits:
            self._paused = True
            self._wire.pause_reading()

    def eof_received(self) -> bool | None:
        """The client has closed its side, which is told in its order."""
        if self._waits:
            self._ended = True
            return True
        closed: bool | None = self._tls.eof_received()
        return closed

    def pause_writing(self) -> None:
        """The send buffer is full."""
        self._tls.pause_writing()

    def resume_writing(self) -> None:
        """It has room again."""
        self._tls.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """What has come before this is nobody's any more."""
        self._held, self._ended = b"", False
        self._tls.connection_lost(exc)

    def _take(self) -> None:
        held, self._held, self._waits = self._held, b"", False
        for start in range(0, len(held), PIECE):
            piece = held[start : start + PIECE]
            feed(self._tls, piece)
            self._see(len(piece))
            if self._wire.is_closing():
                break
        if self._paused:
            self._paused = False
            if not self._wire.is_closing():
                self._wire.resume_reading()
        if self._ended:
            self._ended = False
            if not self._tls.eof_received():
                self._wire.close()

    def _see(self, size: int) -> None:
        now, received = time.monotonic(), self._served.received
        left = self._empty + size - (received - self._received)
        left -= EMPTY_RATE * (now - self._looked)
        self._empty, self._received, self._looked = max(left, 0.0), received, now
        if left > EMPTY and self._inner.is_reading():
            CLOSED.labels("records").inc()
            self._wire.abort()


def feed(tls: Any, data: bytes) -> None:
    """Have a protocol of TLS take this."""
    left = memoryview(data)
    while left:
        buffer = tls.get_buffer(len(left))
        size = min(len(buffer), len(left))
        buffer[:size] = left[:size]
        tls.buffer_updated(size)
        left = left[size:]
