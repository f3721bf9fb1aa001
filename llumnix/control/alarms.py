"""What is wrong with the cluster's keys, told to operators: in the log, in /status, as a metric."""

import logging
import threading
import time
from enum import StrEnum
from typing import NamedTuple

from llumnix.metrics import KEY_FAULTS

logger = logging.getLogger(__name__)

SHOWN = 600.0  # seconds for which a warning is shown after it was last true
AGAIN = 60.0  # seconds until the same sentence is logged again


class Matter(StrEnum):
    """What a warning is about; there is one at a time of each."""

    LEADER = "leader"
    NAME = "name"
    TOKEN = "token"


class Told(NamedTuple):
    """One sentence, and when (monotonic) it was last true."""

    sentence: str
    when: float


class Alarms:
    """The warnings of one node. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._warnings: dict[Matter, Told] = {}

    def tell(self, matter: Matter, sentence: str) -> None:
        """Tell that something is wrong now; each call counts as one occurrence."""
        KEY_FAULTS.labels(matter.value).inc()
        now = time.monotonic()
        with self._lock:
            last = self._warnings.get(matter)
            self._warnings[matter] = Told(sentence, now)
        if last is None or last.sentence != sentence or now - last.when > AGAIN:
            logger.warning("%s", sentence)

    def now(self) -> list[dict[str, object]]:
        """The warnings to be shown: each sentence, and how many seconds ago it was last true."""
        now = time.monotonic()
        with self._lock:
            shown = [(m, w) for m, w in self._warnings.items() if now - w.when <= SHOWN]
        return [
            {"about": matter.value, "sentence": sentence, "seconds_ago": round(now - when, 1)}
            for matter, (sentence, when) in shown
        ]
