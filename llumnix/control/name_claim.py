"""A node's name: only one process at a time has it."""

import logging
import time

from llumnix.cluster import NodeInfo
from llumnix.control.codec import decode_node
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdUnavailable, NameTaken
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import KeyValue

logger = logging.getLogger(__name__)

POLL = 0.25  # seconds between looks whether the name is free
MORE = 2.0  # seconds that etcd may take to notice that a lease has run out


class Claim:
    """The key `nodes/<node>`, for the process that is about to be that node.

    `alone` says that nobody else can have started on the same etcd, which is this process's own.
    """

    def __init__(self, etcd: Etcd, key: str, me: NodeInfo, *, alone: bool = False) -> None:
        self._etcd = etcd
        self._key = key
        self._me = me
        self._alone = alone

    def wait(self, ttl: float) -> None:
        """Return once no other process has the name; a dead one's lease lives for `ttl` seconds.

        Raises NameTaken.
        """
        deadline = time.monotonic() + ttl + MORE
        told = False
        while (found := self._found()) is not None and not self._is_past(found):
            if time.monotonic() >= deadline:
                raise self._taken(found)
            if not told:
                told = True
                logger.info(
                    "%s is in etcd already, so this node waits for up to %.0f s for it to go.",
                    self._key,
                    ttl + MORE,
                )
            time.sleep(POLL)

    def take(self, session: Session, value: bytes) -> int:
        """Make the key this session's, and return its revision. Raises NameTaken.

        Without an answer of etcd it is left to the session, which writes it when it can.
        """
        try:
            found = self._etcd.get(self._key)
            if found is None:
                ours, now = self._etcd.put_if_absent(self._key, value, session.lease)
            elif found.lease == session.lease or self._is_past(found):
                revision = found.mod_revision
                ours, changed = self._etcd.compare_and_swap(
                    self._key, value, revision, session.lease
                )
                now = changed or found
            else:
                ours, now = False, found
        except EtcdUnavailable as error:
            logger.warning("Whether %s is free is not known: %s.", self._key, error)
            return 0
        if not ours:
            raise self._taken(now)
        return now.mod_revision

    def _found(self) -> KeyValue | None:
        try:
            return self._etcd.get(self._key)
        except EtcdUnavailable:
            return None

    def _is_past(self, found: KeyValue) -> bool:
        """Whether the key found can't be that of a process that lives."""
        if not found.lease:
            return True
        try:
            address = decode_node(self._me.id, found.value).address
        except ValueError:
            return False
        # Two processes can't listen at one address, unless it is the loopback of two machines.
        here = address.startswith(("127.", "localhost:", "[::1]"))
        return address == self._me.address and (self._alone or not here)

    def _taken(self, found: KeyValue) -> NameTaken:
        try:
            where = f" at {decode_node(self._me.id, found.value).address}"
        except ValueError:
            where = ""
        return NameTaken(
            f"another process{where} is node {self._me.id} of this cluster already: give each "
            "node a name of its own (--node)"
        )
