"""What is wrong with the cluster's keys, told to operators: in the log, in /status, as a metric."""

import logging
import threading
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from llumnix.cluster import NodeInfo
from llumnix.control.cluster_secrets import same_token
from llumnix.control.codec import decode_node
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys
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


class Sentinel:
    """Raises the alarm where another process writes this node's own entry, or the token.

    The session repairs them. For one thread.
    """

    def __init__(
        self, keys: Keys, me: NodeInfo, since: int, token: str | None, alarms: Alarms
    ) -> None:
        """Watch the entry that this process has made in revision `since`.

        `token` is that of the key, None where the key is of no meaning.
        """
        self._keys = keys
        self._me = me
        self._since = since
        self._token = token
        self._alarms = alarms
        self._seen: dict[str, KeyValue | None] = {}

    def look(self, items: Mapping[str, KeyValue]) -> None:
        """Look for foreign values; to be called with all keys, whenever one has changed."""
        if (found := self._changed(items, self._keys.node(self._me.id))) is not None:
            self._look_at_name(found)
        if (found := self._changed(items, self._keys.token)) is not None:
            self._look_at_token(found)

    def _changed(self, items: Mapping[str, KeyValue], key: str) -> KeyValue | None:
        """The key's value, if it is another than at the last look."""
        found = items.get(key)
        if found is self._seen.get(key):
            return None
        self._seen[key] = found
        return found

    def _look_at_name(self, found: KeyValue) -> None:
        try:
            other = decode_node(self._me.id, found.value)
        except ValueError:
            return  # the session writes it again
        if other.epoch != self._me.epoch and found.mod_revision > self._since:
            self._alarms.tell(
                Matter.NAME,
                f"Another process, at {other.address}, says that it is node {self._me.id} too: "
                "stop one of the two (--node).",
            )

    def _look_at_token(self, found: KeyValue) -> None:
        if self._token is not None and not same_token(found.value, self._token):
            self._alarms.tell(
                Matter.TOKEN,
                f"The cluster's token in etcd ({self._keys.token}) was overwritten, and is put "
                "back by the nodes that have the former one; to change it, stop all nodes first.",
            )
