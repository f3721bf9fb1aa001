"""The changes of a prefix as one member tells them, with proofs that the member still lives."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from llumnix.control.etcd.channel import Member, Unreachable, WatchStream
from llumnix.control.etcd.client import Etcd
from llumnix.control.etcd.errors import EtcdError, WatchEnded
from llumnix.control.etcd.types import Probe, WatchBatch

_PROBE_TIMEOUT = 1.0  # seconds; a healthy quorum answers in milliseconds


@dataclass(frozen=True, slots=True)
class Proof:
    """The member answered a read that took a quorum; `asked` is when, by the monotonic clock."""

    probe: Probe
    asked: float


class Feed:
    """One watch stream and the probes beside it. `next` is for one thread only.

    A probe is due `interval` seconds after the last one; `next` calls `on_ask` before it sends one.
    """

    def __init__(
        self,
        etcd: Etcd,
        member: Member,
        prefix: str,
        revision: int,
        interval: float,
        *,
        on_ask: Callable[[], None] = lambda: None,
    ) -> None:
        self._etcd = etcd
        self._member = member
        self._prefix = prefix
        self._revision = revision
        self._interval = interval
        self._on_ask = on_ask
        self._inbox: queue.SimpleQueue[WatchBatch | Proof | EtcdError | None] = queue.SimpleQueue()
        self._asked: float | None = None
        self._ask_at = float("inf")
        self._stream: WatchStream | None = None
        self._pump = threading.Thread(target=self._drain, name=f"feed {prefix}", daemon=True)

    def start(self) -> None:
        """Open the stream; changes count from the revision given."""
        self._stream = self._etcd.watch(self._prefix, self._revision, self._member)
        self._ask_at = time.monotonic() + self._interval
        self._pump.start()

    def next(self) -> WatchBatch | Proof | None:
        """Wait for the next change or proof; None after `wake`.

        Raises WatchEnded or Unreachable, at the latest a probe's interval and timeout after the
        member fell silent.
        """
        while True:
            limit = self._ask_at if self._asked is None else self._asked + 2 * _PROBE_TIMEOUT
            try:
                news = self._inbox.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                if self._asked is not None:
                    raise Unreachable("a probe was never answered", sent=True) from None
                self._ask()
                continue
            if isinstance(news, EtcdError):
                raise news
            if isinstance(news, Proof):
                self._asked, self._ask_at = None, news.asked + self._interval
            return news

    def next_at_once(self) -> WatchBatch | None:
        """A further change that has already arrived, if that is what comes next."""
        if self._inbox.empty():
            return None
        news = self._inbox.get()
        if isinstance(news, WatchBatch):
            return news
        self._inbox.put(news)  # only changes must stay in order
        return None

    def wake(self) -> None:
        """Make `next` return; from any thread."""
        self._inbox.put(None)

    def stop(self) -> None:
        """End the stream and its thread."""
        if self._stream is not None:
            self._stream.cancel()
            self._pump.join()

    def _ask(self) -> None:
        self._on_ask()
        asked = self._asked = time.monotonic()

        def answer(result: Probe | EtcdError) -> None:
            self._inbox.put(Proof(result, asked) if isinstance(result, Probe) else result)

        self._etcd.probe(self._prefix, self._member, _PROBE_TIMEOUT, answer)

    def _drain(self) -> None:
        assert self._stream is not None
        try:
            for batch in self._stream:
                self._inbox.put(batch)
        except WatchEnded as error:
            self._inbox.put(error)
