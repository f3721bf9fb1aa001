"""The ledger: who owns each request, and which of its tokens have been accepted.

The API server that holds the client's connection keeps it. Positions make each token reach the
client once; epochs make a late owner harmless. No I/O, no threads, no clock.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llumnix.cluster import InstanceId


class Acceptance(StrEnum):
    """What became of an output that was offered to the ledger."""

    ACCEPTED = "accepted"
    UNKNOWN = "unknown_request"  # never opened here, finished or cancelled
    STALE = "stale_epoch"  # from an owner that lost the request meanwhile
    REPEATED = "repeated_position"  # the client has these tokens already
    GAP = "missing_position"  # tokens before these never arrived


@dataclass(slots=True)
class Entry:
    """One open request: as it was dispatched, and everything accepted so far."""

    request: Any  # the engine's own request object, sent again whenever the request moves
    owner: InstanceId | None = None  # None until it is dispatched
    epoch: int = 0
    tokens: list[int] = field(default_factory=list)
    begun: int = 0  # position at which its owner has begun
    deaths: int = 0  # of those, what it may have done: less what it was cleared of
    crashes: int = 0  # engines that died under it
    excused: int = 0  # of those, in which others died that it never ran on
    fault: str = ""  # the exception that ended one of them in a step which it had begun with
    guilty: bool = False  # the same has ended two
    died_under: set[InstanceId] = field(default_factory=set)  # which ones
    lost_by: set[InstanceId] = field(default_factory=set)  # owners not to be tried again

    def clear(self) -> None:
        """It was found innocent of one of its engines' deaths."""
        self.deaths = max(self.deaths - 1, 0)
        self.fault = ""

    @property
    def gained(self) -> int:
        """How many tokens its last owner has generated."""
        return len(self.tokens) - self.begun

    @property
    def position(self) -> int:
        """The position of the next output token, counted from 0."""
        return len(self.tokens)


class Ledger:
    """All open requests of one API server."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self.dropped: Counter[Acceptance] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[str]:
        """The ids of all open requests."""
        return iter(list(self._entries))

    def open(self, request_id: str, request: Any) -> Entry:
        """Begin a request; its first owner gets it by `move`, in epoch 1.

        Raises ValueError if a request of that id is open already.
        """
        if request_id in self._entries:
            raise ValueError(f"request {request_id} is open already")
        entry = self._entries[request_id] = Entry(request)
        return entry

    def get(self, request_id: str) -> Entry | None:
        """The open request of that id, if any."""
        return self._entries.get(request_id)

    def move(self, request_id: str, owner: InstanceId) -> Entry:
        """Give the request to `owner` in a new epoch; the old owner's outputs are stale from now.

        Raises KeyError if the request is not open.
        """
        entry = self._entries[request_id]
        entry.owner = owner
        entry.epoch += 1
        entry.begun = len(entry.tokens)
        return entry

    def release(self, request_id: str) -> Entry:
        """Take the request from its owner, in a new epoch; nobody owns it until `move`.

        Raises KeyError if the request is not open.
        """
        entry = self._entries[request_id]
        if entry.owner is not None:
            entry.lost_by.add(entry.owner)
        entry.owner = None
        entry.epoch += 1
        return entry

    def accept(self, request_id: str, epoch: int, position: int, tokens: list[int]) -> Acceptance:
        """Offer an output whose first token stands at `position`; take it, or count why not."""
        entry = self._entries.get(request_id)
        if entry is None:
            verdict = Acceptance.UNKNOWN
        elif entry.epoch != epoch:
            verdict = Acceptance.STALE
        elif position < len(entry.tokens):
            verdict = Acceptance.REPEATED
        elif position > len(entry.tokens):
            verdict = Acceptance.GAP
        else:
            entry.tokens += tokens
            return Acceptance.ACCEPTED
        self.dropped[verdict] += 1
        return verdict

    def close(self, request_id: str) -> Entry | None:
        """End a request, finished or cancelled; whatever still arrives for it is dropped."""
        return self._entries.pop(request_id, None)

    def owned_by(self, instance: InstanceId) -> Iterator[tuple[str, Entry]]:
        """The open requests of one instance; the ledger may change while iterating."""
        return iter([(i, e) for i, e in self._entries.items() if e.owner == instance])
