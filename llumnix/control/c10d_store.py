"""The rendezvous of one transfer group, in etcd: a store as torch.distributed's groups want it.

Engines' workers are given its qualified name and load it by that, as engines don't know this room.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import DistStoreError, Store

from llumnix.backoff import Backoff
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError, EtcdUnavailable

logger = logging.getLogger(__name__)


class EtcdStore(Store):  # type: ignore[misc]  # torch's types are not followed
    """The keys under `prefix`, which ends in "/" and is new for each attempt to make a group.

    All arguments can be JSON; `credentials` are as for `Etcd`. Whatever waits for a key
    gives up after `timeout` seconds (or those of `set_timeout`), a few seconds later if etcd does
    not answer either. Every failure is a DistStoreError with one sentence, which torch's C++ code
    hands on to whoever makes the group.

    A key lives until `close`, or for `lease_ttl` seconds: a rendezvous is over long before, so no
    lease is prolonged, and nothing stays of a process that dies. What is written late gets a new
    lease, so that each key lives for `timeout` at least. Close the store when something has come
    through the group, not sooner, as the other end may still be reading. Until then keep a
    reference to it: torch keeps only its C++ half, which can do nothing alone.

    Nothing is connected before the first call. Any thread may call.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str,
        *,
        timeout: float = 30.0,
        lease_ttl: float = 60.0,
        **credentials: Any,
    ) -> None:
        super().__init__()
        self.set_timeout(timedelta(seconds=timeout))
        self._etcd = Etcd(endpoints, **credentials)
        self._prefix = prefix
        self._ttl = lease_ttl
        self._lock = threading.Lock()
        self._leases: list[int] = []  # the last one is that of new keys
        self._lease_ends = float("-inf")
        self._closed = threading.Event()

    def close(self) -> None:
        """Delete what was written here and end every call under way; may be called again.

        Where etcd can't be reached, the keys end with their leases.
        """
        self._closed.set()
        with self._lock:
            leases, self._leases = self._leases, []
        for lease in leases:
            try:
                self._etcd.lease_revoke(lease, timeout=2.0)
            except EtcdError as error:
                logger.warning("%s ends by itself, with its lease: %s.", self._prefix, error)
        self._etcd.close()

    # reading

    def get(self, key: str) -> bytes:
        """Wait for the key."""
        return self._wait_for([key], self.timeout)[key]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Wait for all of the keys."""
        found = self._wait_for(keys, self.timeout)
        return [found[key] for key in keys]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait for all of the keys."""
        self._wait_for(keys, self.timeout if timeout is None else timeout)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of the keys are there now."""
        with self._failing(f"look for {', '.join(keys)}"):
            return self._all().keys() >= set(keys)

    def num_keys(self) -> int:
        with self._failing("count the keys"):
            return len(self._all())

    # writing

    def set(self, key: str, value: str | bytes) -> None:
        self._change(key, lambda now: _raw(value))

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to the number that the key holds, 0 if there is none, and return the sum."""
        return int(self._change(key, lambda now: b"%d" % (int(now or 0) + amount)) or 0)

    def append(self, key: str, value: str | bytes) -> None:
        self._change(key, lambda now: (now or b"") + _raw(value))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set the key if it is as expected, or is absent and expected to be empty.

        Returns what it holds then; of a key that stays absent, what was expected.
        """
        old, new = _raw(expected), _raw(desired)
        found = self._change(key, lambda now: new if (now or b"") == old else None)
        return old if found is None else found

    def delete_key(self, key: str) -> bool:
        """Delete the key; whether there was one."""
        with self._failing(f"delete {key}"):
            return self._etcd.delete(self._prefix + key)

    # what else torch's C++ code calls, by these names

    def has_extended_api(self) -> bool:
        """Whether there are append, multi_get and multi_set: yes."""
        return True

    def clone(self) -> "EtcdStore":
        """The store for another thread, which may as well use this one."""
        return self

    deleteKey = delete_key
    getNumKeys = num_keys

    def _all(self) -> dict[str, bytes]:
        """Every key there is: a rendezvous has so few that one request for all is the cheapest."""
        listed, _ = self._etcd.get_prefix(self._prefix)
        return {kv.key.removeprefix(self._prefix): kv.value for kv in listed}

    def _wait_for(self, keys: Sequence[str], within: timedelta) -> dict[str, bytes]:
        deadline = time.monotonic() + within.total_seconds()
        what = f"wait {within.total_seconds():.1f} s for {', '.join(keys)}"
        pause = Backoff(0.005, 0.2)
        with self._failing(what):
            while True:
                silence: EtcdUnavailable | None = None
                try:
                    found = self._all()
                    if found.keys() >= set(keys):
                        return found
                except EtcdUnavailable as error:
                    silence = error
                left = deadline - time.monotonic()
                if left <= 0:
                    raise silence or TimeoutError("nobody has written it")
                if self._closed.wait(min(left, pause.delay())):
                    raise EtcdUnavailable("the store was closed")

    def _change(self, key: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Make of what the key holds what `change` says, None for no change; return what it is.

        Only ever by compare-and-swap, so that no two changes are taken for one.
        """
        with self._failing(f"write {key}"):
            now = self._etcd.get(self._prefix + key)
            while True:
                value = change(now.value if now else None)
                if value is None:
                    return now.value if now else None
                name, lease = self._prefix + key, self._lease()
                if now is None:
                    ours, now = self._etcd.put_if_absent(name, value, lease)
                else:
                    ours, now = self._etcd.compare_and_swap(name, value, now.mod_revision, lease)
                if ours:
                    return value

    def _lease(self) -> int:
        """A lease that lives as long as anybody waits."""
        with self._lock:
            if self._closed.is_set():
                raise EtcdUnavailable("the store was closed")
            asked, within = time.monotonic(), self.timeout.total_seconds()
            if not self._leases or asked + within > self._lease_ends:
                lease, ttl = self._etcd.lease_grant(max(self._ttl, within))
                self._leases.append(lease)
                self._lease_ends = asked + ttl
            return self._leases[-1]

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Give whatever goes wrong the one type that torch knows."""
        if self._closed.is_set():
            raise DistStoreError(f"could not {what} under {self._prefix}: the store was closed")
        try:
            yield
        except (EtcdError, TimeoutError, ValueError) as error:
            raise DistStoreError(f"could not {what} under {self._prefix}: {error}") from error


def _raw(value: str | bytes) -> bytes:
    """A value as bytes, which C++ gives; Python callers may give text."""
    return value.encode() if isinstance(value, str) else value
