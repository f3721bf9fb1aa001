"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def eventually(predicate: Callable[[], object], within: float = 5.0, every: float = 0.02) -> float:
    """Polls until `predicate` is true and returns the seconds that took; fails after `within`."""
    began = time.monotonic()
    while not predicate():
        took = time.monotonic() - began
        assert took < within, f"still not so after {took:.1f} s"
        time.sleep(every)
    return time.monotonic() - began
