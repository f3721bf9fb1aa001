"""What may happen a thousand times a second, said once in a while."""

import logging
import time


class Seldom:
    """Logs the first of many, and then how many there have been, at most every `every` seconds."""

    def __init__(self, logger: logging.Logger, text: str, every: float = 30.0) -> None:
        """`text`: a sentence with one %d, for how many there were since the last time."""
        self._logger = logger
        self._text = text
        self._every = every
        self._said = float("-inf")
        self._number = 0

    def count(self) -> None:
        """One more."""
        self._number += 1
        now = time.monotonic()
        if now - self._said >= self._every:
            self._logger.warning(self._text, self._number)
            self._said, self._number = now, 0
