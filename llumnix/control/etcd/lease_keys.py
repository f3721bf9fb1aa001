"""Keys that one lease keeps: what they should be, and what of that is known to be in etcd."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.types import Compare, Delete, KeyValue

logger = logging.getLogger(__name__)

Judge = Callable[[bytes], bool]  # whether a value is wrong, and this node's is to take its place

_CALM = 1.0  # seconds between repairs done at once: two nodes of one name must not fight flat out


class OwnedKeys:
    """The wanted and the written values. `settle_one` is for one thread, the rest for any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: dict[str, bytes] = {}
        self._unwanted: set[str] = set()  # to be deleted
        self._written: dict[str, tuple[bytes, int]] = {}  # value, revision
        self._writing: tuple[str, bytes] | None = None
        self._common: dict[str, bytes] = {}  # of no lease; any node may have put them
        self._judges: dict[str, Judge] = {}  # of another value of these
        self._strayed: dict[str, int] = {}  # of these: missing (0), or a wrong value's mod revision
        self._revision = 0  # of the last snapshot
        self._repaired = float("-inf")

    def put(self, key: str, value: bytes) -> None:
        with self._lock:
            self._wanted[key] = value
            self._unwanted.discard(key)

    def remove(self, key: str) -> None:
        with self._lock:
            if self._wanted.pop(key, None) is not None:
                self._written.pop(key, None)
                self._unwanted.add(key)

    def keep(self, key: str, value: bytes, is_wrong: Judge) -> None:
        with self._lock:
            self._common[key] = value
            self._judges[key] = is_wrong

    def forget_written(self) -> None:
        """Have everything written again, as the lease is a new one."""
        with self._lock:
            self._written.clear()
            self._unwanted.clear()

    def settle_one(self, etcd: Etcd, lease: int) -> bool:
        """Write or delete one key that needs it; False when none does. Raises EtcdError."""
        with self._lock:
            self._writing = self._next_unwritten()
            unwanted = next(iter(self._unwanted), None)
            strayed = next(iter(self._strayed.items()), None)
        if self._writing is not None:
            self._write(etcd, *self._writing, lease)
        elif unwanted is not None:
            # Only with our lease: its next owner may have put it already.
            etcd.txn([Compare(unwanted, "lease", lease)], [Delete(unwanted)])
            with self._lock:
                self._unwanted.discard(unwanted)
        elif strayed is not None:
            self._put_back(etcd, *strayed)
        else:
            return False
        return True

    def _put_back(self, etcd: Etcd, key: str, revision: int) -> None:
        value = self._common[key]
        if not revision:
            ours, found = etcd.put_if_absent(key, value)
            if not ours and found.value != value:
                logger.warning("%s was lost, and is now another than that of this node.", key)
        else:
            ours, _ = etcd.compare_and_swap(key, value, revision)
        with self._lock:
            if self._strayed.get(key) == revision:
                del self._strayed[key]
        if ours and revision:
            logger.warning("%s was overwritten in etcd, so it is written again.", key)
        elif ours:
            logger.info("etcd had lost %s, so it is written again.", key)

    def disturbed(self, items: Mapping[str, KeyValue], revision: int, lease: int) -> bool:
        """Whether a snapshot shows a key that somebody else changed and that is to be written now.

        A later repair within the same second is left to the session's next beat.
        """
        now = time.monotonic()
        with self._lock:
            if revision < self._revision:  # etcd was wiped, or an older copy is back
                keys = list(self._written)
            else:
                keys = [k for k in self._written if self._is_foreign(k, items, revision, lease)]
            self._revision = revision
            self._strayed = self._astray(items)
            for key in keys:
                logger.info("%s is not as this node wrote it, so it is written again.", key)
                del self._written[key]
            if 0 in self._strayed.values():
                return True
            if not (keys or self._strayed) or now - self._repaired < _CALM:
                return False
            self._repaired = now
            return True

    def _astray(self, items: Mapping[str, KeyValue]) -> dict[str, int]:
        astray = {}
        for key, value in self._common.items():
            found = items.get(key)
            if found is None:
                astray[key] = 0
            elif found.value != value and self._judges[key](found.value):
                astray[key] = found.mod_revision
        return astray

    def _is_foreign(
        self, key: str, items: Mapping[str, KeyValue], revision: int, lease: int
    ) -> bool:
        value, written = self._written[key]
        if revision <= written:
            return False  # the snapshot is older than the write
        found = items.get(key)
        if found is None or found.lease != lease:
            return True
        return found.value != value and (key, found.value) != self._writing

    def _next_unwritten(self) -> tuple[str, bytes] | None:
        for key, value in self._wanted.items():
            if self._written.get(key, (None, 0))[0] != value:
                return key, value
        return None

    def _write(self, etcd: Etcd, key: str, value: bytes, lease: int) -> None:
        with self._lock:
            known = key in self._written
        revision = etcd.put(key, value, lease)
        with self._lock:
            self._writing = None
            # Found to be foreign meanwhile, or removed: then what is there now is not known.
            if key in self._wanted and known == (key in self._written):
                self._written[key] = (value, revision)
