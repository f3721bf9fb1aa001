"""Publishes a node's loads: on change only, at most a few times a second, latest wins."""

import threading
from collections.abc import Callable, Sequence

from llumnix.cluster import InstanceLoad
from llumnix.control.codec import encode_loads


class LoadPublisher:
    """Hands encoded reports to `write`, which must not block, from its own thread.

    `interval` is the least time between two reports, in seconds.
    """

    def __init__(self, write: Callable[[bytes], None], interval: float = 0.2) -> None:
        self._write = write
        self._interval = interval
        self._latest: tuple[InstanceLoad, ...] | None = None
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loads", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def report(self, loads: Sequence[InstanceLoad]) -> None:
        """Replace the node's loads by these; returns at once."""
        latest = tuple(sorted(loads, key=lambda load: load.instance))
        with self._lock:
            if latest == self._latest:
                return
            self._latest = latest
        self._changed.set()

    def stop(self) -> None:
        """End the thread; what was not yet written stays unwritten."""
        self._stopping.set()
        self._changed.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        written: tuple[InstanceLoad, ...] | None = None
        while not self._stopping.is_set():
            self._changed.wait()
            self._changed.clear()
            with self._lock:
                latest = self._latest
            if latest is not None and latest != written and not self._stopping.is_set():
                self._write(encode_loads(latest))
                written = latest
                self._stopping.wait(self._interval)
