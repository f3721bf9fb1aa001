"""How engines of `FaultyExecutor` are told to fail: by a file for a process, or by a prompt."""

from pathlib import Path

FOLDER = "CHAOS_ORDERS"  # the environment variable that names the folder of the files
POISON = [7, 11, 7, 11, 7, 11]  # the beginning of a prompt that no engine survives


def done(order: Path) -> Path:
    """Where an order is kept that was obeyed; the file's time tells when."""
    return order.with_suffix(".done")
