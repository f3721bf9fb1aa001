"""Unknown is not lost: what a list of etcd lacks, though nobody saw it deleted, is kept a while."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from llumnix.control.etcd.types import KeyValue


class Grace:
    """Keeps missing keys for `seconds`, in which whoever wrote them can come back.

    After an outage a list may lack a node only because that node has not yet found etcd again, or
    because etcd has lost its data. And the first thing that etcd does when it is back may be to end
    the leases that nobody could prolong meanwhile. So for as long after each list but the first,
    deletions count as little as what a list lacks; later a deletion that a watch saw is believed.

    `concerns` says which keys are kept. Times are given by the caller, from one steady clock; they
    must be of moments in which etcd is known to answer, so that no grace ends in an outage. For one
    thread.
    """

    def __init__(self, seconds: float, concerns: Callable[[str], bool]) -> None:
        self._seconds = seconds
        self._concerns = concerns
        self._items: Mapping[str, KeyValue] = {}
        self._kept: dict[str, KeyValue] = {}
        self._end = float("inf")
        self._listed = False
        self._doubts_until = float("-inf")

    @property
    def kept(self) -> Collection[str]:
        """The keys that are shown though etcd does not hold them."""
        return self._kept.keys()

    def after_list(self, items: Mapping[str, KeyValue], now: float) -> Mapping[str, KeyValue]:
        """What to show after a list; whatever it lacks has its whole time from now on."""
        shown = {**self._kept, **self._items}
        self._kept = {
            key: kv for key, kv in shown.items() if key not in items and self._concerns(key)
        }
        self._end = now + self._seconds if self._kept else float("inf")
        if self._listed:
            self._doubts_until = now + self._seconds
        self._listed = True
        return self._show(items)

    def after_events(
        self, items: Mapping[str, KeyValue], deleted: Collection[str], now: float
    ) -> Mapping[str, KeyValue]:
        """What to show after changes that a watch told, some of which were deletions."""
        if now < self._doubts_until:
            shown = {**self._kept, **self._items}
            doubted = {k: shown[k] for k in deleted if k in shown and self._concerns(k)}
            self._kept |= doubted
            if doubted:
                self._end = now + self._seconds
        else:
            for key in [k for k in self._kept if k in deleted]:
                del self._kept[key]
        for key in [k for k in self._kept if k in items]:
            del self._kept[key]
        return self._show(items)

    def is_over(self, now: float) -> bool:
        """Whether there are keys whose time has run out, so that `end` has something to do."""
        return bool(self._kept) and now >= self._end

    def end(self) -> Mapping[str, KeyValue]:
        """What to show from now on: only what etcd holds."""
        self._kept.clear()
        return self._show(self._items)

    def _show(self, items: Mapping[str, KeyValue]) -> Mapping[str, KeyValue]:
        self._items = items
        return MappingProxyType({**items, **self._kept}) if self._kept else items
