"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def eventually(predicate: Callable[[], object], within: float = 20.0, every: float = 0.02) -> float:
    """Polls until `predicate` is true and returns the seconds that took; fails if a look that
    began `within` seconds or later finds it false, so that a slow look is not the last one."""
    began = time.monotonic()
    while True:
        looked = time.monotonic() - began
        if predicate():
            return time.monotonic() - began
        assert looked < within, f"still not so after {looked:.1f} s"
        time.sleep(every)
