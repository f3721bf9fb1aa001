"""Requests that have no owner which answers: since when, and how long their streams paused."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from llumnix.metrics import FAILOVER_SECONDS, MIGRATION_GAP_SECONDS


@dataclass(frozen=True, slots=True)
class _HandedOver:
    """A request that was handed over to a new owner, which has not answered yet."""

    began: float  # monotonic
    epoch: int  # that it has there


class Interruptions:
    """The interrupted requests of one API server."""

    def __init__(
        self,
        on_gap: Callable[[float], None] = MIGRATION_GAP_SECONDS.observe,
        on_failover: Callable[[float], None] = FAILOVER_SECONDS.observe,
    ) -> None:
        """`on_gap`: called with the seconds that a move has interrupted a stream of tokens;
        `on_failover`: with those from the loss of an owner to the next token."""
        self._on_gap = on_gap
        self._on_failover = on_failover
        self._moving: dict[str, _HandedOver] = {}
        self._homeless: dict[str, float] = {}  # since when (monotonic) it has lost its owner

    @property
    def any(self) -> bool:
        """Whether there are any at present."""
        return bool(self._moving or self._homeless)

    def moved(self, request_id: str, epoch: int) -> None:
        """Its owner has handed it over, to one that has it in this epoch."""
        former = self._moving.get(request_id)
        began = former.began if former else time.monotonic()
        self._moving[request_id] = _HandedOver(began, epoch)

    def lost(self, request_id: str, anew: bool) -> None:
        """It has no owner; `anew`: since this moment, even if it had none before."""
        now = time.monotonic()
        if anew:
            self._homeless[request_id] = now
        self._homeless.setdefault(request_id, now)

    def found(self, request_id: str) -> None:
        """It had an owner until now, whether that has answered or not."""
        self._homeless.pop(request_id, None)

    def since(self, request_id: str) -> float:
        """Since when (monotonic) it has had no owner; now if it has one."""
        return self._homeless.get(request_id, time.monotonic())

    def moves_to(self, request_id: str, epoch: int) -> bool:
        """Whether it came to its owner of this epoch by a move, and has not begun there."""
        move = self._moving.get(request_id)
        return move is not None and move.epoch == epoch

    def answered(self, request_id: str, position: int) -> None:
        """An output at this position has been accepted: measure what is over now."""
        move = self._moving.pop(request_id, None)
        since = self._homeless.pop(request_id, None)
        if position and move is not None:
            self._on_gap(time.monotonic() - move.began)
        if position and since is not None:
            self._on_failover(time.monotonic() - since)

    def ended(self, request_id: str) -> None:
        """Forget it."""
        self._moving.pop(request_id, None)
        self._homeless.pop(request_id, None)
