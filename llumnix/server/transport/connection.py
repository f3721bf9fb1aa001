"""One client's connection: aiohttp's, and what has to be seen below HTTP that it does not see."""

import asyncio
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, cast

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from llumnix.metrics import CLOSED, REFUSALS
from llumnix.server.errors import error_response
from llumnix.server.transport.connection_places import Limits, Places
from llumnix.server.transport.departed_clients import Leaving
from llumnix.server.transport.unfinished_heads import PIECE, HeadRefused, Heads, Share, cost
from llumnix.server.transport.unsent import Unsent

PIPELINED = 32  # requests behind the one that is being answered, which nobody has in earnest
# Seconds for which what is behind it may keep the connection from being read: who leaves meanwhile
# is not seen. It takes 64 KiB behind an upgrade, or 128 KiB of a waiting request's body.
UNREAD = 0.5
# Of a body in chunks: bytes that may be frames and nothing else, and the share of all that come.
# A chunk costs the parser as much whether it brings one byte or a thousand.
FRAMES_FREE, FRAMES_SHARE = 16 * 1024, 0.25
LAST = 2.0  # seconds for an answer to a body that is not read any further
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection(web.RequestHandler):
    """Ends at once with its client, also while its send buffer is full.

    A client that closes its side before it has its answer is gone, though it might go on reading:
    those that have left look the same. asyncio would keep such a connection for as long as the
    other kernel says that it has no room for what is in the send buffer.
    """

    __slots__ = (
        *("_body", "_body_size", "_deaf", "_leaving", "_paused_since", "_places", "_share"),
        *("_unsent", "_wire"),
        *("asks_to_go_on", "busy", "gone", "on_leaving", "received"),
    )

    def __init__(
        self,
        manager: web.Server,
        places: Places,
        heads: Heads,
        leaving: Leaving,
        limits: Limits,
        **options: Any,
    ) -> None:
        """`leaving`: the turns of all clients that leave; `options` are aiohttp's."""
        super().__init__(manager, **options)
        self._places = places
        self._share = Share(heads)
        self._body: StreamReader = EMPTY_PAYLOAD  # of the request that came last
        self._body_size = 0  # bytes that came of it, with its chunks' frames
        self._deaf = False  # whether whatever still comes is no request
        self._leaving = leaving
        self._unsent = Unsent(limits)
        self._paused_since: asyncio.TimerHandle | None = None  # while it is not read
        # Called when the client has left, before its handler ends: at once, so it must cost little.
        self.on_leaving: Callable[[], None] | None = None
        self.gone = False  # when the client has left; its handler may still be about to end
        self.busy = False  # while a request is being answered
        self.asks_to_go_on = False  # before it sends the body
        self.received = 0  # bytes, of requests and of what comes after an upgrade
        self._wire: asyncio.Transport | None = None  # aiohttp forgets its own when it closes it

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        # uvloop's are none by their class.
        self._wire = self._unsent.wire = cast(asyncio.Transport, transport)
        super().connection_made(transport)
        self._places.enter(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """The connection is no more: what it has asked for ends, and its handler in its turn."""
        self._wire = self._unsent.wire = None
        self._unsent.settle()
        if self._paused_since is not None:
            self._paused_since.cancel()
        self._places.leave(self)
        self._share.release()
        self._leave()
        self._leaving.ending.call(partial(super().connection_lost, exc))

    def data_received(self, data: bytes) -> None:
        """Bytes of a request, which may not be whole."""
        self.received += len(data)
        if not self.busy:
            self._places.stir(self)
        if self._upgraded:
            super().data_received(data)
            if self._payload_parser is None:  # nobody has taken it over, and it waits
                self._wait(len(data))
            return
        self._take(data[:PIECE] if len(data) > PIECE else data)
        for start in range(PIECE, len(data), PIECE):
            self._take(data[start : start + PIECE])
        if len(self._messages) >= PIPELINED:
            self._too_much_behind()  # aiohttp would read no more

    def _take(self, piece: bytes) -> None:
        """Have a piece parsed, so small that little of a next head can follow what ends in it."""
        if self._deaf:
            return
        of_a_head = self._body.is_eof()
        seen = self._request_count
        super().data_received(piece)
        came = self._request_count - seen
        if came:
            message, self._body = self._messages[-1]
            self._body_size = 0
            if isinstance(message, _ErrInfo):
                self._deaf = True
                return
        elif not of_a_head:
            self._frames(len(piece))
        try:
            if of_a_head or came:
                self._share.more(len(piece), message if came else None)
            if of_a_head or (self.busy and self._messages):  # of a request that waits
                new = islice(reversed(self._messages), came)
                self._share.wait(len(piece) + sum(cost(message) for message, _ in new))
        except HeadRefused as refused:
            self._refuse(refused, bool(came) or not of_a_head)

    def _wait(self, size: int) -> None:
        """Bytes have come behind an upgrade that is not answered yet, in which nothing is seen."""
        try:
            self._share.wait(size)
        except HeadRefused:
            self._too_much_behind()

    def _too_much_behind(self) -> None:
        if self._wire is not None:
            CLOSED.labels("pipelined").inc()
            self._wire.abort()

    def _pause_transport_reading(self) -> None:
        """aiohttp has too much that nobody reads, and reads no more until somebody does."""
        super()._pause_transport_reading()
        if self._paused_since is None and self._wire is not None:
            loop = asyncio.get_running_loop()
            self._paused_since = loop.call_later(UNREAD, self._look_why_paused)

    def _look_why_paused(self) -> None:
        """End who has what is behind his request keep it from being seen that he leaves.

        The body of the request itself is another matter: nothing runs before it has been read.
        """
        self._paused_since = None
        if self._wire is None or not (self._reading_paused or self._buffer_paused):
            return
        if self.busy and (self._messages or (self._upgraded and self._payload_parser is None)):
            self._too_much_behind()
        else:
            loop = asyncio.get_running_loop()
            self._paused_since = loop.call_later(UNREAD, self._look_why_paused)

    def _frames(self, size: int) -> None:
        """More of a body has come, which must not be frames of chunks for the most part."""
        self._body_size += size
        frames = self._body_size - self._body.total_bytes
        if frames > FRAMES_FREE + FRAMES_SHARE * self._body_size and self._wire is not None:
            CLOSED.labels("chunks").inc()
            self._deaf = True
            # Whoever reads the body answers with this; whoever does not has little time.
            self._body.set_exception(web.RequestPayloadError("its chunks are too small"))
            self._body.feed_eof()
            asyncio.get_running_loop().call_later(LAST, self.hang_up)

    def _refuse(self, refused: HeadRefused, came: bool) -> None:
        """Answer with this in place of the request that came last, or that is to come."""
        self._deaf = True
        if came:
            self._messages.pop()
        error = _ErrInfo(status=refused.status, exc=refused, message=str(refused))
        self._messages.append((error, EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it
        """The client has closed its side: what it has asked for ends. True: it is closed here."""
        if self._wire is None:
            return None
        if self.busy:
            self._leave()
            self._leaving.closing.call(self._wire.abort)
        else:
            self.expect()
            self._leaving.closing.call(self._wire.close)  # when all has been sent
        return self._wire.get_extra_info("sslcontext") is None  # TLS is closed in any case

    def pause_writing(self) -> None:
        """The send buffer is full."""
        super().pause_writing()
        self.expect()

    def resume_writing(self) -> None:
        """The client has read again."""
        super().resume_writing()
        self._unsent.settle()
        self._expect_of_strangers()  # there is less, and still some

    def set_parser(self, *given: Any, **named: Any) -> None:
        """The client speaks another protocol from now on, as only nodes do that prove it."""
        self.vouch()
        super().set_parser(*given, **named)

    async def finish_response(self, *given: Any) -> tuple[web.StreamResponse, bool]:
        """Send the answer, or what is left of it."""
        finished = await super().finish_response(*given)
        self._expect_of_strangers()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no HTTP, of which there may be much; a bug is aiohttp's to tell."""
        if isinstance(exc, HeadRefused):
            REFUSALS.labels(exc.limit).inc()
            response = error_response(status, str(exc), exc.headers)
            response.force_close()
            return response
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        REFUSALS.labels("malformed").inc()
        detail = (message or str(exc) or "it can't be parsed").strip().splitlines()[0].rstrip(": ")
        response = error_response(status, f"the request is not valid HTTP: {detail}")
        response.force_close()
        return response

    # ---- what its places and its server ask ----

    def begin(self) -> None:
        """A request has come."""
        self.busy = True
        self._places.begin(self)
        self._share.keep(sum(map(_size, self._messages)) if self._messages else 0)
        self._unsent.begin(self.writing_paused)

    def vouch(self) -> None:
        """The request's caller is known."""
        self._unsent.vouch()
        self._places.unstick(self)

    def rest(self) -> None:
        """The request has been answered, but for what is still to be sent."""
        self.busy = self.asks_to_go_on = False
        self._places.rest(self)

    def go_on(self) -> None:
        """The body is wanted."""
        if self.asks_to_go_on and self._wire is not None:
            self._wire.write(CONTINUE)
        self.asks_to_go_on = False

    @property
    def known(self) -> bool:
        """Whether the last request has shown who has sent it."""
        return self._unsent.known

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return self._unsent.size

    def end(self) -> None:
        """Close it, with little time for its client to do so too, or to take what is unsent."""
        if self.unsent and not self._unsent.known:
            self.hang_up()
            return
        self._unsent.part()
        self.force_close()

    def hang_up(self) -> None:
        """Cut it off, whatever is unsent, if it is still open."""
        if self._wire is not None:
            self._wire.abort()

    def expect(self) -> None:
        """Have the client take what is unsent, or be cut off."""
        if not self._unsent.known:
            self._places.stick(self)
        self._unsent.expect()

    def _expect_of_strangers(self) -> None:
        if not self._unsent.known and self.unsent:
            self.expect()

    def _leave(self) -> None:
        self.gone = True
        if self.on_leaving is not None:
            leave, self.on_leaving = self.on_leaving, None
            leave()


def _size(waiting: tuple[Any, StreamReader]) -> int:
    """Bytes of a request that waits, or of an error in its place."""
    message, body = waiting
    return 0 if isinstance(message, _ErrInfo) else cost(message, head=True) + body.total_bytes
