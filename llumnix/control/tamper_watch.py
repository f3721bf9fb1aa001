"""Watches two keys that no other process should write: this node's own entry, and the token."""

from collections.abc import Mapping

from llumnix.cluster import NodeInfo
from llumnix.control.alarms import Alarms, Matter
from llumnix.control.cluster_token import same_token
from llumnix.control.codec import decode_node
from llumnix.control.etcd.types import KeyValue
from llumnix.control.keys import Keys


class Sentinel:
    """Raises the alarm where others write them; the session repairs them. For one thread."""

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
