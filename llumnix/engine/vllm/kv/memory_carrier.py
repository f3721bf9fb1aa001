"""KV blocks by way of memory: the receiver copies them out of the sender's cache.

A connection between the two, over the machine's own network, only says which blocks are ready and
when they have been copied.
"""

import contextlib
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from llumnix.engine.vllm.kv.carrier import Absent, Carrier, SetupError, Touching, WorkerPlace
from llumnix.engine.vllm.kv.kv_memory import KvMemory
from llumnix.engine.vllm.kv.peer_memory import NotReadable, PeerMemory, export

_KEY_BYTES = 16
_LENGTH = struct.Struct("!I")
_MOST_BYTES = 1 << 24  # of a message
_COPIED, _READABLE, _UNREADABLE, _WELCOME, _KEPT = (bytes([n]) for n in range(1, 6))


class MemoryOffer:
    """A sender's memory, until the receiver has come for it."""

    def __init__(self, memory: KvMemory, address: str, me: WorkerPlace) -> None:
        """Add to `me` how to reach this memory; nothing is added where it can't be exported."""
        self._listener: socket.socket | None = None
        self._key = secrets.token_bytes(_KEY_BYTES)
        if "memory" not in me.ladder or (exported := export(memory)) is None:
            return
        self._listener = socket.create_server((address, 0), backlog=4)
        me.memory, me.key = exported, self._key
        me.address = (address, self._listener.getsockname()[1])

    def accept(self, deadline: float) -> "Lender":
        """Wait for the receiver. Raises Absent, and NotReadable if it can't read this memory."""
        assert self._listener is not None
        try:
            while True:  # whoever does not know the key is not the one
                self._listener.settimeout(_left(deadline))
                channel, _ = self._listener.accept()
                channel.settimeout(min(_left(deadline), 1.0))
                try:
                    if secrets.compare_digest(_take(channel, _KEY_BYTES), self._key):
                        channel.settimeout(_left(deadline))
                        readable = _take(channel, 1) == _READABLE
                        channel.sendall(_WELCOME)
                        if not readable:
                            raise NotReadable("the other worker can't read this KV cache")
                        return Lender(channel)
                except OSError:
                    pass
                channel.close()
        except OSError as error:
            raise Absent(f"the other worker did not come for its blocks: {error}") from error
        finally:
            self.close()

    def close(self) -> None:
        """Wait for nobody any more."""
        if self._listener is not None:
            self._listener.close()


class _MemoryCarrier(Carrier):
    """Either end, with the connection to the other."""

    kind = "memory"

    def __init__(self, channel: socket.socket) -> None:
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._channel = channel

    @property
    def gone(self) -> bool:
        """Whether the other end has closed the connection, as its death does."""
        return _ended(self._channel)

    def abort(self) -> None:
        """End the connection: the other worker is told of no more blocks."""
        self.aborted = True
        with contextlib.suppress(OSError):  # it has ended already
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; memory stays mapped while something still reads it."""
        self.abort()
        self._channel.close()


class Lender(_MemoryCarrier):
    """The sender, whose blocks another worker reads."""

    def send(self, blocks: list[int], deadline: float, touching: Touching) -> None:
        """Say which blocks can be read; returns when they have been."""
        body = msgspec.msgpack.encode(blocks)
        self._channel.settimeout(_left(deadline))
        self._channel.sendall(_LENGTH.pack(len(body)) + body)
        self._channel.settimeout(_left(deadline))
        if _take(self._channel, 1) != _COPIED:
            raise OSError("the other worker could not copy the blocks")
        self._channel.sendall(_KEPT)


class Reader(_MemoryCarrier):
    """The receiver, which reads another worker's blocks."""

    def __init__(self, memory: KvMemory, sender: WorkerPlace, deadline: float) -> None:
        """Connect to a sender.

        Raises Absent, SetupError, and NotReadable if both know that they are to go another way.
        """
        self._cuda = memory.device.type == "cuda"
        try:
            channel = socket.create_connection(sender.address, _left(deadline))
        except TimeoutError as error:
            raise Absent(f"the other worker does not answer: {error}") from error
        except OSError as error:
            raise SetupError(f"the other worker can't be reached: {error}") from error
        super().__init__(channel)
        try:
            channel.sendall(sender.key)
            self.memory = PeerMemory(memory, sender.memory)
            channel.sendall(_READABLE)
            self._welcomed(deadline)
        except OSError as error:
            channel.close()
            raise Absent(str(error)) from error
        except NotReadable:
            channel.sendall(_UNREADABLE)
            self._welcomed(deadline)
            channel.close()
            raise

    def _welcomed(self, deadline: float) -> None:
        """The sender has heard who this is, so nothing of the rendezvous is needed any more."""
        self._channel.settimeout(_left(deadline))
        if _take(self._channel, 1) != _WELCOME:
            raise OSError("the other worker sends nonsense")

    def receive(self, blocks: list[int], deadline: float, touching: Touching) -> None:
        """Wait until the sender says which blocks are ready, and copy them."""
        self._channel.settimeout(_left(deadline))
        length = _LENGTH.unpack(_take(self._channel, _LENGTH.size))[0]
        if length > _MOST_BYTES:
            raise OSError("the other worker sends nonsense")
        self._channel.settimeout(_left(deadline))
        theirs: Any = msgspec.msgpack.decode(_take(self._channel, length), type=list[int])
        if len(theirs) != len(blocks):
            raise OSError(f"{len(theirs)} blocks are sent, and {len(blocks)} are expected")
        with touching():
            self.memory.pull(theirs, blocks)
            if self._cuda:
                torch.cuda.current_stream().synchronize()
        self._channel.sendall(_COPIED)
        # They were what they had to be only if the sender has held them until now.
        self._channel.settimeout(_left(deadline))
        if _take(self._channel, 1) != _KEPT:
            raise OSError("the other worker sends nonsense")

    def pull(self, theirs: Sequence[int], mine: Sequence[int]) -> None:
        """Fill blocks at once, on a GPU on the current stream; for whoever knows they are ready."""
        self.memory.pull(theirs, mine)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the transfer's time is over")
    return left


def _take(channel: socket.socket, count: int) -> bytes:
    """So many bytes. Raises OSError if the connection ends before."""
    found = b""
    while len(found) < count:
        more = channel.recv(count - len(found))
        if not more:
            raise ConnectionError("the other worker has ended the connection")
        found += more
    return found


def _ended(channel: socket.socket) -> bool:
    """Whether the other end has closed a connection on which nothing is under way; at once."""
    try:
        # Asked first: MSG_DONTWAIT alone waits as long as the socket's own time-out says.
        look = select.poll()
        look.register(channel, select.POLLIN)
        if not look.poll(0):
            return False
        return channel.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):  # broken, or closed here
        return True
