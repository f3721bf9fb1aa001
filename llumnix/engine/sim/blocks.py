"""The KV blocks of a modelled engine: no bytes move, but rooms are booked and hashes kept.

A block is named by the prompt and its place, since a modelled stream's tokens follow from these.
What has arrived becomes the resumed request's own when it comes; there is no prefix cache.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from llumnix.engine.base import EngineDead, EngineError, NoRoom, RequestEnded, Transfer
from llumnix.engine.sim.model import ModelledEngine

BLOCK_BYTES = 64  # that a modelled block counts for


@dataclass(slots=True)
class _Arriving:
    hashes: list[bytes] = field(default_factory=list)
    stored: int = 0  # how many of them have arrived


class SimBlocks:
    """See `engine.base.Blocks`."""

    block_bytes = BLOCK_BYTES
    ways = 1

    def __init__(self, model: ModelledEngine) -> None:
        self._model = model
        self._size = model.config.block_size
        self._arriving: dict[str, _Arriving] = {}
        self._leaving: set[str] = set()
        self.gone: str | None = None  # why there is no engine any more

    @property
    def held(self) -> int:
        """Migrations that something is held for; for checks."""
        return len(self._arriving) + len(self._leaving)

    def take(self, prompt: Sequence[int], generated: int) -> int:
        """How many tokens of a request have arrived; their blocks are held no more, but its own."""
        names = _names(prompt, (len(prompt) + generated) // self._size) if self._arriving else []
        for arriving in self._arriving.values():
            stored = arriving.hashes[: arriving.stored]
            if stored and stored == names[: len(stored)]:
                del arriving.hashes[: len(stored)]
                arriving.stored = 0
                self._model.hold(-len(stored))
                return len(stored) * self._size
        return 0

    async def export(self, migration: str, request_id: str) -> list[bytes]:
        """The hashes of a request's full blocks. Raises EngineError if it is not here."""
        self._check()
        computed = self._model.computed(request_id)
        if computed is None:
            raise RequestEnded(f"request {request_id} has ended")
        self._leaving.add(migration)
        return _names(self._model.prompt(request_id), computed // self._size)

    async def reserve(self, migration: str, hashes: list[bytes]) -> int:
        """Hold room for the next blocks; none of them is here. Raises EngineError."""
        self._check()
        try:
            self._model.hold(len(hashes))
        except ValueError as error:
            raise NoRoom(str(error)) from error
        self._arriving.setdefault(migration, _Arriving()).hashes += hashes
        return 0

    async def send(self, migration: str, transfer: Transfer) -> int:
        """Send held blocks. Raises EngineError if they are not held."""
        self._check()
        if migration not in self._leaving:
            raise EngineError(f"the blocks of migration {migration} are not held any more")
        return transfer.count * BLOCK_BYTES

    async def receive(self, migration: str, transfer: Transfer) -> int:
        """Receive into held blocks. Raises EngineError if they are not held."""
        self._check()
        arriving = self._arriving.get(migration)
        if arriving is None:
            raise EngineError(f"the blocks of migration {migration} are not held any more")
        arriving.stored = transfer.first + transfer.count
        return transfer.count * BLOCK_BYTES

    def reads(self, pair: str) -> bool:
        """There is no memory to be read."""
        return False

    async def meet(self, transfer: Transfer, sends: bool) -> None:
        """There is nobody to meet."""
        self._check()

    async def lend(self, migration: str, request_id: str) -> list[int]:
        """Nothing is lent. Raises EngineError."""
        raise EngineError("a modelled engine lends no blocks")

    async def expect(
        self, migration: str, request_id: str, transfer: Transfer, theirs: list[int]
    ) -> None:
        """Nothing is borrowed. Raises EngineError."""
        raise EngineError("a modelled engine borrows no blocks")

    async def drop(self, migration: str) -> None:
        """Hold no block for this migration any more."""
        self._check()
        self._leaving.discard(migration)
        arriving = self._arriving.pop(migration, None)
        if arriving is not None:
            self._model.hold(-len(arriving.hashes))

    def _check(self) -> None:
        if self.gone is not None:
            raise EngineDead(self.gone)


def _names(prompt: Sequence[int], blocks: int) -> list[bytes]:
    digest = hashlib.blake2b(repr(list(prompt)).encode(), digest_size=16).digest()
    return [digest + place.to_bytes(4, "big") for place in range(blocks)]
