"""The time that a call has, and what its steps are expected to take."""

import time


class Budget:
    """Counts from when it is made; without a limit there is always enough."""

    def __init__(self, seconds: float | None) -> None:
        self._end = time.monotonic() + seconds if seconds is not None else float("inf")

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()
