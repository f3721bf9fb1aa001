"""The utility call `migration` of an engine core: blocks that its scheduler holds, and its workers.

Called between steps; nothing here waits for a transfer, which runs in threads of the workers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.request import Request

from llumnix.engine.base import EngineError

# Operations that concern the scheduler's `BlockHolds` alone, and are methods of it.
_OF_HOLDS = frozenset({"lend", "export", "reserve", "store", "drop", "books"})


def migration(core: Any, operation: str, arguments: list[Any]) -> tuple[Any, str | None, str]:
    """Carry out one operation: its result, or why it was refused and the kind of that.

    A refusal is an answer: vLLM would log what is raised here as a failure of the engine's own.
    """
    holds = core.scheduler.block_holds
    try:
        if operation in _OF_HOLDS:
            return getattr(holds, operation)(*arguments), None, ""
        return _OPERATIONS[operation](core, holds, *arguments), None, ""
    except EngineError as refusal:
        return None, str(refusal), type(refusal).__name__


def _send(core: Any, holds: Any, migration: str, first: int, count: int, job: Any) -> None:
    """Have all workers begin to send blocks; each tells the node when it has ended."""
    ids = holds.ids(migration, first, count)
    core.model_executor.collective_rpc("llumnix_send", args=(ids, job))


def _receive(core: Any, holds: Any, migration: str, first: int, count: int, job: Any) -> None:
    """Likewise, to receive them."""
    ids = holds.ids(migration, first, count)
    core.model_executor.collective_rpc("llumnix_receive", args=(ids, job))


def _meet(core: Any, holds: Any, sends: bool, job: Any) -> None:
    """Have all workers meet those of another instance; each tells the node whether they have."""
    method = "llumnix_send" if sends else "llumnix_receive"
    core.model_executor.collective_rpc(method, args=([], job))


def _abort(core: Any, holds: Any, pair: str) -> None:
    """Cut off the transfer that is under way between two instances."""
    core.model_executor.collective_rpc("llumnix_abort", args=(pair,))


def _expect(
    core: Any,
    holds: Any,
    migration: str,
    request_id: str,
    pair: str,
    group: str,
    theirs: list[int],
) -> None:
    """A request is to come to blocks that are lent; then its hashes are known, too."""
    holds.expect(migration, request_id, pair, group, theirs, core.model_executor)
    install_known_hashes(core, core.scheduler.block_size, holds.hashes_of)


_OPERATIONS: dict[str, Callable[..., None]] = {
    "send": _send,
    "receive": _receive,
    "meet": _meet,
    "abort": _abort,
    "expect": _expect,
}

# The last known ones are computed nevertheless. Hashes are chained, so that they show whether the
# request has the tokens of these blocks, which is looked at before it gets the blocks.
PROVED = 2

Hasher = Callable[[Request], list[bytes]]


class KnownHashes:
    """An engine core's hasher, before which the hashes are taken that a migration has brought.

    vLLM hashes the blocks of a request when it comes: 1.1 ms for 7,000 tokens, in which a moved
    stream stands still. Who has been lent the blocks has their hashes already.
    """

    def __init__(
        self, hasher: Hasher, block_size: int, known: Callable[[str], Sequence[bytes]]
    ) -> None:
        """`known` says those of a request's blocks from the first on; asked in any thread."""
        self._hasher = hasher
        self._block_size = block_size
        self._known = known

    def __call__(self, request: Request) -> list[bytes]:
        """What remains to be hashed, after the request has been given those that are known."""
        have = request.block_hashes
        known = self._known(request.request_id)[:-PROVED]
        known = known[: request.num_tokens // self._block_size]
        if len(known) > len(have) and list(known[: len(have)]) == have:
            have.extend(known[len(have) :])
        return self._hasher(request)


def install_known_hashes(
    core: object, block_size: int, known: Callable[[str], Sequence[bytes]]
) -> None:
    """Have an engine core take known hashes; nothing to do where it has done so, or hashes none."""
    hasher = getattr(core, "request_block_hasher", None)
    if hasher is not None and not isinstance(hasher, KnownHashes):
        core.request_block_hasher = KnownHashes(hasher, block_size, known)  # type: ignore[attr-defined]
