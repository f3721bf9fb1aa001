"""What a dispatcher decides from: candidates, their scores, and what is in flight to them.

A report is always late by up to its period plus the way through etcd. Until a report covers it,
what this node has sent is therefore counted in flight; else a burst would all go to the instance
that was the emptiest when the burst began.
"""

from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from random import Random

from llumnix.cluster import (
    ClusterView,
    InstanceId,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    NodeId,
)
from llumnix.policy.decision_context import TERMS, Terms
from llumnix.policy.dispatch import Candidate, Policy, Request, by_load, choose, looked_at
from llumnix.policy.load import NOTHING, InFlight

LOAD = Policy(by_load, keeps=True)
HOPELESS = 3  # failed starts in a row, from which on no request waits for an instance


def is_candidate(view: ClusterView, info: InstanceInfo) -> bool:
    """Whether an instance may get new requests: it is up, and does not drain."""
    return (
        info.state is InstanceState.READY
        and info.total_blocks > 0
        and info.id not in view.draining
        and info.node not in view.draining
    )


def is_awaited(view: ClusterView, info: InstanceInfo) -> bool:
    """Whether requests may wait for an instance: it starts, and is likely to come up.

    One that has died and is to be started again counts as starting.
    """
    return (
        info.state is InstanceState.STARTING
        and info.failed_starts < HOPELESS
        and info.id not in view.draining
        and info.node not in view.draining
    )


@dataclass(slots=True)
class _Entry:
    candidate: Candidate
    open: bool  # whether it may get new requests
    # Sequence, blocks, tokens and priority of each dispatch that no report covers.
    pending: deque[tuple[int, int, int, int]] = field(default_factory=deque)


class DispatchState:
    """Incremental state of one dispatcher: scores are kept, and renewed only where facts change.

    A plain object without threads or clock; whoever owns it calls it from one thread.
    """

    def __init__(
        self,
        node: NodeId,
        policy: Policy = LOAD,
        top_k: int = 1,
        rng: Random | None = None,
        first_sequence: int = 1,
        terms: Terms = TERMS,
    ) -> None:
        """Begin with no instance, for the dispatches of `node`.

        `first_sequence` must be greater than any number that an earlier process of the same node
        used, else an instance that remembers the earlier ones seems to cover the new ones (the
        start time in microseconds will do).

        Raises:
            ValueError: `top_k` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, and must be 1 or more")
        self._node = node
        self._score, self._keeps, self._alone = policy
        self._terms = terms
        self._top_k = top_k
        self._rng = rng or Random()
        self._next = first_sequence
        self._entries: dict[InstanceId, _Entry] = {}
        # Of open instances only, by priority: 0, and those that have a class and were asked for.
        self._scores: dict[int, dict[InstanceId, float]] = {0: {}}
        self._smallest = 0  # total_blocks of the smallest open instance
        self._dispatchers = 1  # in the cluster

    @property
    def scores(self) -> Mapping[InstanceId, float]:
        """The candidates and their scores now for a request of priority 0; greater is better."""
        return self._scores[0]

    def in_flight(self, instance: InstanceId) -> InFlight:
        """What this node sent to `instance` that its last report does not count yet."""
        entry = self._entries.get(instance)
        return entry.candidate.sent if entry else NOTHING

    def update_view(self, view: ClusterView) -> None:
        """Take over a new snapshot; only instances about which it says something new cost work."""
        for instance in self._entries.keys() - view.instances.keys():
            self.forget(instance)
        loads = view.loads
        for instance, info in view.instances.items():
            entry = self._entries.get(instance)
            load = loads.get(instance)
            is_open = is_candidate(view, info)
            if entry is None:
                self._enter(info, load or InstanceLoad(instance), is_open)
            elif (
                (load is not None and load is not entry.candidate.load)
                or info is not entry.candidate.info
                or is_open is not entry.open
            ):
                self._renew(entry, info, load, is_open)
        self._dispatchers = sum(node.api_servers for node in view.nodes.values())
        self._smallest = min(
            (self._entries[i].candidate.info.total_blocks for i in self._scores[0]), default=0
        )

    def sent(self, instance: InstanceId, blocks: int, tokens: int, priority: int = 0) -> int:
        """Count a dispatch in flight, and give it its sequence number.

        The number travels with the request; the instance reports the greatest one it has received
        from this node (`InstanceLoad.received`). `blocks` is the KV that the request asks for now,
        `tokens` what it has to prefill.
        """
        sequence = self._next
        self._next += 1
        if entry := self._entries.get(instance):
            candidate = entry.candidate
            candidate.sent = candidate.sent.plus(blocks, tokens, priority)
            candidate.dispatched += 1
            candidate.last = sequence
            entry.pending.append((sequence, blocks, tokens, priority))
            self._rescore(instance, entry)
        return sequence

    def cancel(self, instance: InstanceId, sequence: int) -> None:
        """Take back a dispatch that never arrived; nothing happens if a report covers it."""
        entry = self._entries.get(instance)
        if entry is None:
            return
        for item in entry.pending:
            if item[0] == sequence:
                entry.pending.remove(item)
                entry.candidate.sent = entry.candidate.sent.minus(*item[1:])
                self._rescore(instance, entry)
                return

    def forget(self, instance: InstanceId) -> None:
        """Drop all that is known of an instance, until a view brings it again."""
        self._entries.pop(instance, None)
        for scores in self._scores.values():
            scores.pop(instance, None)

    def decide(self, request: Request, exclude: Set[InstanceId] = frozenset()) -> InstanceId | None:
        """The instance for a request; None when there is no candidate.

        An instance whose whole KV cache is smaller than the request is taken only when no other
        candidate is larger; what happens to the request then is for the engine to say.
        """
        scores = self._scores_for(request)
        if not exclude.isdisjoint(scores):
            scores = {i: score for i, score in scores.items() if i not in exclude}
        if request.blocks > self._smallest:
            fitting = {
                i: score
                for i, score in scores.items()
                if self._entries[i].candidate.info.total_blocks >= request.blocks
            }
            scores = fitting or scores
        if self._top_k == 1 and not self._alone:
            looked = looked_at(len(scores), self._dispatchers)
            if looked < len(scores):
                scores = {i: scores[i] for i in self._rng.sample(list(scores), looked)}
        return choose(scores, self._top_k, self._rng) if scores else None

    def _scores_for(self, request: Request) -> Mapping[InstanceId, float]:
        """The score of each candidate for a request: what is known of it, or made for it."""
        if not self._keeps:
            return {
                i: self._score(self._entries[i].candidate, request, self._terms)
                for i in self._scores[0]
            }
        key = request.priority if request.priority in self._terms.classes.by_priority else 0
        if key not in self._scores:
            wanted = Request(priority=key)
            self._scores[key] = {
                i: self._score(self._entries[i].candidate, wanted, self._terms)
                for i in self._scores[0]
            }
        return self._scores[key]

    def _enter(self, info: InstanceInfo, load: InstanceLoad, is_open: bool) -> None:
        # A newcomer is taken to have had as many requests as the one with the fewest: counting
        # from 0, `balanced` would send it everything until it has caught up with the others.
        fewest = min((self._entries[i].candidate.dispatched for i in self._scores[0]), default=0)
        entry = _Entry(Candidate(info, load, dispatched=fewest), is_open)
        self._entries[info.id] = entry
        self._rescore(info.id, entry)

    def _renew(
        self, entry: _Entry, info: InstanceInfo, load: InstanceLoad | None, is_open: bool
    ) -> None:
        candidate, pending = entry.candidate, entry.pending
        candidate.info, entry.open = info, is_open
        if info.state is InstanceState.STARTING:
            # An engine that starts anew holds nothing, and its reports will never cover what its
            # predecessor was sent.
            candidate.load, candidate.sent = InstanceLoad(info.id), NOTHING
            pending.clear()
        elif load is not None:
            candidate.load = load
            covered = load.received.get(self._node, 0)
            while pending and pending[0][0] <= covered:
                candidate.sent = candidate.sent.minus(*pending.popleft()[1:])
        self._rescore(info.id, entry)

    def _rescore(self, instance: InstanceId, entry: _Entry) -> None:
        for priority, scores in self._scores.items():
            if not entry.open:
                scores.pop(instance, None)
            elif self._keeps:
                wanted = Request(priority=priority)
                scores[instance] = self._score(entry.candidate, wanted, self._terms)
            else:
                scores[instance] = 0.0  # made anew for each request
