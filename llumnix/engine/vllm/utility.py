"""The utility call `migration` of an engine core: the depot of its scheduler, and its workers.

Called between steps; nothing here waits for a transfer, which runs in threads of the workers.
"""

from typing import Any

from llumnix.engine.vllm.depot import BlockDepot


def migration(core: Any, operation: str, arguments: list[Any]) -> Any:
    """Carry out one operation; its name is a key of OPERATIONS."""
    return OPERATIONS[operation](core, core.scheduler.depot, *arguments)


def _transfer(
    core: Any, depot: BlockDepot, method: str, migration: str, first: int, count: int, job: Any
) -> None:
    """Have all workers begin to send or receive blocks; each tells the node when it has ended."""
    ids = depot.ids(migration, first, count)
    core.model_executor.collective_rpc(method, args=(ids, job))


OPERATIONS: dict[str, Any] = {
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
