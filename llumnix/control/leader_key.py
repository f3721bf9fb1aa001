"""Whether the key `leader` is kept by a node that lives; one that is not would stay for ever."""

import time

from llumnix.control.codec import decode_leader
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.types import Compare, Delete, KeyValue
from llumnix.control.keys import Keys


class Throne:
    """Looks at the leader's key for one candidate, and clears it of what is no leader.

    A node's lease keeps both `nodes/<node>` and, while it leads, `leader`. So a leader's key
    without a lease is nobody's, and so is one whose lease has kept no node of that name for
    `patience` seconds, in which a node that has just come, or come back, writes its own key.
    """

    def __init__(self, etcd: Etcd, keys: Keys, patience: float) -> None:
        self._etcd = etcd
        self._keys = keys
        self._patience = patience
        self._proven: KeyValue | None = None  # the key as it was found to be a node's
        self._doubted = 0, float("inf")  # a mod revision, and since when (monotonic)

    def fault(self, found: KeyValue) -> str | None:
        """Why nobody leads by this key, in a clause; None if a node does, or may do. EtcdError."""
        if not found.lease:
            return "it has no lease, so it would never end"
        if found == self._proven:
            return None
        node = self._node(found)
        if node is not None and node.lease == found.lease:
            self._proven = found
            return None
        now = time.monotonic()
        if self._doubted[0] != found.mod_revision:
            self._doubted = found.mod_revision, now
        if now - self._doubted[1] < self._patience:
            return None
        return f"its lease has kept no node of that name for {self._patience:.0f} s"

    def clear(self, found: KeyValue) -> bool:
        """Delete the key as it was found; False if it has changed meanwhile. Raises EtcdError."""
        when = [Compare(found.key, "mod", found.mod_revision)]
        return self._etcd.txn(when, [Delete(found.key)]).succeeded

    def _node(self, found: KeyValue) -> KeyValue | None:
        """The entry of the node that the key names, if it names one."""
        try:
            key = self._keys.node(decode_leader(found.value))
        except ValueError:
            return None
        return self._etcd.get(key)
