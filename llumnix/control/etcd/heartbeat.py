"""Whether a thread of the control loop still comes round, whatever etcd does."""

import time


class Pulse:
    """Beats with each turn of one thread, and before and after whatever that thread waits for.

    No wait of the control loop is longer than a lease's time to live, as each has a deadline of its
    own. So what has not beaten for that long has died or hangs.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # as a sentence would name the thread's work
        self._last = float("inf")  # until the first beat it is not expected to beat

    def beat(self) -> None:
        """Note that the thread has come round; for that thread."""
        self._last = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last beat; 0 before the first."""
        return max(0.0, time.monotonic() - self._last)
