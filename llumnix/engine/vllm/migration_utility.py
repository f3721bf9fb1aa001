"""The utility call `migration` of an engine core: the depot of its scheduler, and its workers.

Called between steps; nothing here waits for a transfer, which runs in threads of the workers.
"""

from typing import Any

from llumnix.engine.vllm import known_hashes
from llumnix.engine.vllm.block_holds import BlockDepot, DepotError


def migration(core: Any, operation: str, arguments: list[Any]) -> tuple[Any, str | None, str]:
    """Carry out one operation, a key of OPERATIONS: its result, or why it was refused and the kind.

    A refusal is an answer: vLLM would log what is raised here as a failure of the engine's own.
    """
    try:
        return OPERATIONS[operation](core, core.scheduler.depot, *arguments), None, ""
    except DepotError as refusal:
        return None, str(refusal), refusal.kind


def _transfer(
    core: Any, depot: BlockDepot, method: str, migration: str, first: int, count: int, job: Any
) -> None:
    """Have all workers begin to send or receive blocks; each tells the node when it has ended."""
    ids = depot.ids(migration, first, count)
    core.model_executor.collective_rpc(method, args=(ids, job))


def _meet(core: Any, depot: BlockDepot, sends: bool, job: Any) -> None:
    """Have all workers meet those of another instance; each tells the node whether they have."""
    method = "llumnix_send" if sends else "llumnix_receive"
    core.model_executor.collective_rpc(method, args=([], job))


def _expect(
    core: Any,
    depot: BlockDepot,
    migration: str,
    request_id: str,
    pair: str,
    group: str,
    theirs: list[int],
) -> None:
    """A request is to come to blocks that are lent; then its hashes are known, too."""
    depot.expect(migration, request_id, pair, group, theirs, core.model_executor)
    known_hashes.install(core, core.scheduler.block_size, depot.hashes_of)


OPERATIONS: dict[str, Any] = {
    "meet": _meet,
    "lend": lambda core, depot, *arguments: depot.lend(*arguments),
    "expect": _expect,
    "export": lambda core, depot, *arguments: depot.export(*arguments),
    "reserve": lambda core, depot, *arguments: depot.reserve(*arguments),
    "send": lambda core, depot, *arguments: _transfer(core, depot, "llumnix_send", *arguments),
    "receive": lambda core, depot, *arguments: _transfer(
        core, depot, "llumnix_receive", *arguments
    ),
    "store": lambda core, depot, *arguments: depot.store(*arguments),
    "drop": lambda core, depot, *arguments: depot.drop(*arguments),
    "abort": lambda core, depot, *arguments: core.model_executor.collective_rpc(
        "llumnix_abort", args=arguments
    ),
    "books": lambda core, depot: depot.books(),
}
