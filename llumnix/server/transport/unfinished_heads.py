"""Heads of requests that are not whole yet, which cost memory before anybody's key is seen.

Each has a largest size, and all of a node's have a budget. What waits behind a request that is
being answered counts as well: nobody has looked at it either.
"""

from http import HTTPStatus
from typing import Any

from llumnix.server.errors import RETRY_SOON

PIECE = 16 * 1024  # bytes that the parser gets at a time while it looks for the end of a head
FREE = 8 * 1024  # bytes of each connection that the budget does not count: most have no more
# Bytes that a parsed request takes beside its own, and each of its headers, however short.
MESSAGE, HEADER = 1024, 128


class HeadRefused(Exception):
    """A head that is not read to its end; the message is one sentence for its client."""

    def __init__(self, limit: str, status: int, message: str) -> None:
        super().__init__(message)
        self.limit = limit  # for the metrics
        self.status = status
        self.headers = RETRY_SOON if status == HTTPStatus.SERVICE_UNAVAILABLE else None


class Heads:
    """What all connections of a node have of unfinished heads."""

    def __init__(self, largest: int, budget: int) -> None:
        """`largest`: bytes of one head; `budget`: of all together."""
        self.largest = largest
        self.budget = budget
        self.held = 0  # bytes of the budget


class Share:
    """What one connection has of them."""

    __slots__ = ("_begun", "_heads", "_held", "_size")

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        self._size = 0  # bytes that wait
        self._begun = 0  # of them, in the head that is not whole
        self._held = 0  # of the budget

    def more(self, size: int, message: Any) -> None:
        """Bytes of a head have come, and with the last ones its message. Raises HeadRefused."""
        self._begun += size
        largest = self._heads.largest
        if message is None:
            if self._begun > largest:
                self._refuse()
        elif self._begun > largest and _size(message) > largest:  # a piece may hold more than it
            self._refuse()
        else:
            self._begun = 0

    def wait(self, size: int) -> None:
        """Bytes have come that are to wait until a request begins. Raises HeadRefused."""
        self._size += size
        more = self._size - FREE - self._held
        if more <= 0:
            return
        heads = self._heads
        if heads.held + more > heads.budget:
            raise HeadRefused(
                *("head_budget", HTTPStatus.SERVICE_UNAVAILABLE),
                f"heads of {heads.budget} bytes are unfinished at this server; try again soon",
            )
        self._held += more
        heads.held += more

    def keep(self, size: int) -> None:
        """A request has begun, behind which as many bytes wait, and maybe some of a head."""
        self._size = size + self._begun
        held = max(0, self._size - FREE)
        self._heads.held += held - self._held
        self._held = held

    def release(self) -> None:
        """The connection has ended."""
        self._begun = 0
        self.keep(0)

    def _refuse(self) -> None:
        raise HeadRefused(
            *("head", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
            f"the head of a request must have at most {self._heads.largest} bytes",
        )


def cost(message: Any, head: bool = False) -> int:
    """Bytes that a request takes while it waits, beside those of its head, or with them."""
    return MESSAGE + HEADER * len(message.raw_headers) + (_size(message) if head else 0)


def _size(message: Any) -> int:
    headers = sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
    return len(message.path) + headers
