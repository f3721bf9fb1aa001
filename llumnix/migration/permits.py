"""Whom the arrivals of a node ask: its migration actor, also while that ends."""

import asyncio
import contextlib
from typing import Any

from pykka import ActorDeadError

from llumnix.cluster import InstanceId
from llumnix.engine.base import EngineError

TRIES, PAUSE = 10, 0.1  # and the seconds between them: in one an actor that has died is back


class Doorkeeper:
    """The migration actor as `engine.arrival` knows it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor  # proxy of the MigrationActor

    async def accept(
        self, migration: str, request_id: str, instance: InstanceId, blocks: int
    ) -> None:
        """Take the record from proposed to accepted. Raises EngineError to refuse."""
        try:
            await self._actor.accept(migration, request_id, instance, blocks)
        except ActorDeadError as error:
            raise EngineError("this node stops, or its books are being opened again") from error

    async def departed(self, migration: str) -> None:
        """An accepted migration has ended; when this node stops, its lease takes the record."""
        for _ in range(TRIES):
            with contextlib.suppress(ActorDeadError):  # its successor has the same books
                await self._actor.departed(migration)
                return
            await asyncio.sleep(PAUSE)
