"""Which node leads: the one whose lease keeps the key `leader`."""

import logging
import threading
import time

from llumnix.cluster import ClusterView, NodeId
from llumnix.control.alarms import Alarms, Matter
from llumnix.control.codec import decode_leader, encode_leader
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError
from llumnix.control.etcd.heartbeat import Pulse
from llumnix.control.etcd.session import Session
from llumnix.control.etcd.types import Compare, Delete, KeyValue
from llumnix.control.keys import Keys

logger = logging.getLogger(__name__)


class Election:
    """Stands for leader whenever there is none. Its epoch is the key's create revision.

    `epoch` needs no thread to become 0: it ends with the time for which the lease is certainly
    held, so that no two nodes ever lead at once, and comes back if etcd then says that the lease
    lived on.
    """

    def __init__(
        self,
        etcd: Etcd,
        session: Session,
        keys: Keys,
        node: NodeId,
        *,
        interval: float = 2.0,
        patience: float = 6.0,
        alarms: Alarms | None = None,
    ) -> None:
        """`patience` is for how many seconds a leader may be no node before its key is deleted."""
        self._etcd = etcd
        self._session = session
        self._key = keys.leader
        self._node = node
        self._interval = interval
        self._throne = Throne(etcd, keys, patience)
        self._alarms = alarms or Alarms()
        self.pulse = Pulse("the election")
        self._lock = threading.Lock()
        self._won: tuple[int, int] | None = None  # epoch, lease
        self._stands_from = float("-inf")
        self._told = 0  # the epoch in which this node led when it was last logged
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="election", daemon=True)

    @property
    def epoch(self) -> int:
        """The epoch in which this node leads, certainly; 0 while it doesn't."""
        won = self._won
        if won is None or won[1] != self._session.lease or self._session.remaining <= 0:
            return 0
        return won[0]

    def start(self) -> None:
        """Begin to stand for leader; returns at once."""
        self._thread.start()

    def observe(self, view: ClusterView) -> None:
        """Take notice of a new view, to stand at once when nobody leads; never blocks."""
        mine = view.leader == self._node
        free = view.leader is None and time.monotonic() >= self._stands_from
        if free or mine != (self._won is not None):
            self._wake.set()

    def resign(self, aside: float = 5.0) -> bool:
        """Give up leading and stand aside for `aside` seconds; whether this node led.

        Raises EtcdError when the key could not be deleted; this node does not lead then either.
        """
        won = self._step_down(time.monotonic() + aside)
        if won is None:
            return False
        logger.info("This node (%s) resigns, in epoch %d.", self._node, won[0])
        self._give_up(*won)
        return True

    def retire(self) -> None:
        """Give up leading, and stand no more; returns at once.

        This object's thread deletes the key, and tries again as long as etcd is silent.
        """
        won = self._step_down(float("inf"))
        if won is not None:
            logger.info(
                "This node (%s) resigns, in epoch %d, and stands no more.", self._node, won[0]
            )

    def _step_down(self, stands_from: float) -> tuple[int, int] | None:
        """Lead no more, and stand again at that time; returns what was won until now."""
        with self._lock:
            self._stands_from = max(self._stands_from, stands_from)
            won, self._won = self._won, None
        self._wake.set()
        return won

    def stop(self) -> None:
        """End the thread and resign, if etcd can be reached."""
        self._stopping.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        try:
            self.resign()
        except EtcdError as error:
            logger.warning(
                "The leadership could not be given up and ends with the lease: %s.", error
            )
        self._tell()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            try:
                self._stand()
            except EtcdError as error:
                logger.debug("Who leads is not known: %s.", error)
            self._tell()
            self.pulse.beat()
            self._wake.wait(self._pause())
            self.pulse.beat()

    def _pause(self) -> float:
        if not self._session.lease:
            return 0.1  # the session is about to have one
        if self._told:
            return min(self._interval, self._session.remaining + 0.01)
        return self._interval

    def _stand(self) -> None:
        """Look who leads, and take the key if nobody does."""
        lease = self._session.lease
        if not lease:
            return
        found = self._in_order(self._etcd.get(self._key), lease)
        if found is None and time.monotonic() >= self._stands_from:
            self.pulse.beat()
            _, found = self._etcd.put_if_absent(self._key, encode_leader(self._node), lease)
        with self._lock:
            if found is None or found.lease != lease:
                self._won = None
                return
            if time.monotonic() >= self._stands_from:
                self._won = (found.create_revision, lease)
                return
        self.pulse.beat()
        self._give_up(found.create_revision, lease)  # won while we resigned

    def _in_order(self, found: KeyValue | None, lease: int) -> KeyValue | None:
        """The key, unless it is nobody's: then it is deleted."""
        if found is None:
            return None
        if found.lease == lease:
            fault = "" if found.value == encode_leader(self._node) else "it names another node"
        else:
            fault = self._throne.fault(found) or ""
        if not fault or not self._throne.clear(found):
            return found
        what = f"The key {self._key} was {found.value[:80]!r}, by which nobody leads"
        self._alarms.tell(Matter.LEADER, f"{what} ({fault}), so it was deleted.")
        return None

    def _give_up(self, epoch: int, lease: int) -> None:
        """Delete the key that was won so, unless it has gone already."""
        when = [Compare(self._key, "create", epoch), Compare(self._key, "lease", lease)]
        self._etcd.txn(when, [Delete(self._key)])

    def _tell(self) -> None:
        last, self._told = self._told, self.epoch
        if last == self._told:
            return
        if self._told:
            logger.info("This node (%s) leads, in epoch %d.", self._node, self._told)
        else:
            logger.info(
                "This node (%s) does not lead any more, as it did in epoch %d.", self._node, last
            )


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
