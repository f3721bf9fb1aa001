"""Live migrations on the virtual clock: copied while the request decodes, then handed over."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llumnix.cluster import ClusterView, InstanceId, kv_blocks
from llumnix.policy.decision_context import Terms
from llumnix.policy.rebalance import Pair, leaving, leaving_together
from llumnix.policy.request_choice import TOGETHER
from llumnix.policy.rescheduler import MoveOrder
from llumnix.simulator.cluster import MigrationCost
from llumnix.simulator.instance import SimInstance, VirtualClock
from llumnix.simulator.result import Hop, Story


@dataclass(slots=True, eq=False)
class _Move:
    pair: Pair
    name: str
    source: SimInstance
    destination: SimInstance
    held: int = 0  # blocks at the destination
    moved: int = 0  # blocks that came with it


@dataclass(slots=True, eq=False)
class _Together:
    """Requests that wait, and go at once."""

    pair: Pair
    names: list[str]
    source: SimInstance
    destination: SimInstance


class SimMoves:
    """Carries out what the rescheduler orders; the source chooses, as in a live cluster."""

    def __init__(
        self,
        clock: VirtualClock,
        cost: MigrationCost,
        terms: Terms,
        rule: str,
        # A move has ended: whether it was made, of how many requests, with how many KV blocks.
        finished: Callable[[Pair, bool, int, int], object],
    ) -> None:
        self._clock = clock
        self._cost = cost
        self._terms = terms
        self._rule = rule
        self._finished = finished
        self._leaving: set[str] = set()
        self.failed: Counter[str] = Counter()  # why, and how often
        self.under_way = 0

    def begin(
        self,
        view: ClusterView,
        instances: dict[InstanceId, SimInstance],
        order: MoveOrder,
    ) -> None:
        """Have the source of a pair choose a request, or those that go together, and move it."""
        pair = order.pair
        source, destination = instances.get(pair.source), instances.get(pair.destination)
        if source is None or destination is None:
            self._fail(pair, "an instance is gone")
            return
        candidates = source.candidates(self._leaving)
        if pair.rule in TOGETHER:
            many = leaving_together(pair, candidates, view, self._terms, order.moves, order.blocks)
            self._begin_together(_Together(pair, [c.request for c in many], source, destination))
            return
        chosen = leaving(
            pair, candidates, view, self._terms, self._rule, order.drains, order.blocks
        )
        if chosen is None:
            self._fail(pair, "no request would fit")
            return
        move = _Move(pair, chosen.request, source, destination)
        self._leaving.add(move.name)
        self.under_way += 1
        for instance in (source, destination):
            instance.moves += 1
            instance.slowdown = self._cost.slowdown
        self._copy(move)

    def _begin_together(self, move: "_Together") -> None:
        if not move.names:
            self._fail(move.pair, "no request would fit")
            return
        self._leaving.update(move.names)
        self.under_way += 1
        for instance in (move.source, move.destination):
            instance.coming += 1
        hand_over = partial(self._hand_over_together, move)
        self._clock.after(self._cost.message, move.source.at_boundary, hand_over)

    def _hand_over_together(self, move: "_Together") -> None:
        """Those that wait still, in one go; who has begun meanwhile, or ended, is left out."""
        source, size = move.source, move.destination.engine.config.block_size
        waiting = [n for n in move.names if n in source.stories and not source.runs(n)]
        blocks = 0
        for name in waiting:
            story = source.remove(name)
            blocks += kv_blocks(story.job.prompt + len(story.times), size)
            hop = Hop(self._clock.now, source.id, move.destination.id, 0.0, 0)
            story.hops.append(hop)
            move.destination.add(story)
        self._leaving.difference_update(move.names)
        self.under_way -= 1
        for instance in (source, move.destination):
            instance.coming -= 1
        if waiting:
            self._finished(move.pair, True, len(waiting), blocks)
        else:
            self._fail(move.pair, "all have begun")

    def _copy(self, move: _Move) -> None:
        if not move.source.runs(move.name):  # it waits, and has nothing to be copied
            self._clock.after(self._cost.message, self._leave, move)
        elif self._hold(move):
            tokens = self._tokens(move)
            self._clock.after(self._cost.copy(tokens), self._at_boundary, move)
        else:
            self._end(move, "the destination is full")

    def _at_boundary(self, move: _Move) -> None:
        move.source.at_boundary(partial(self._leave, move))

    def _leave(self, move: _Move) -> None:
        """Hand over, unless the request has ended or was preempted meanwhile."""
        if move.name not in move.source.stories:
            self._end(move, "the request has ended")
        elif move.source.runs(move.name):
            if not move.held:  # it waited when it was chosen, and has begun since
                self._copy(move)
            elif self._hold(move):
                tokens = self._tokens(move)
                story = move.source.remove(move.name)
                self._clock.after(self._cost.downtime(tokens), self._arrive, move, story, tokens)
            else:
                self._end(move, "the destination is full")
        elif move.held:
            self._end(move, "the request was preempted")
        else:
            move.source.at_boundary(partial(self._hand_over_waiting, move))

    def _hand_over_waiting(self, move: _Move) -> None:
        if move.name not in move.source.stories or move.source.runs(move.name):
            self._leave(move)
        else:
            self._arrive(move, move.source.remove(move.name), 0)

    def _arrive(self, move: _Move, story: Story, tokens: int) -> None:
        now, blocks = self._clock.now, move.held
        self._give_back(move)
        downtime = self._cost.downtime(tokens) if tokens else 0.0
        story.hops.append(Hop(now, move.source.id, move.destination.id, downtime, blocks))
        move.destination.add(story, tokens)
        move.moved = kv_blocks(story.job.prompt + len(story.times), self._size(move))
        self._end(move, "")

    def _tokens(self, move: _Move) -> int:
        story = move.source.stories[move.name]
        return story.job.prompt + len(story.times)

    @staticmethod
    def _size(move: _Move) -> int:
        return move.destination.engine.config.block_size

    def _hold(self, move: _Move) -> bool:
        """Reserve what the request has by now at the destination; False if that is too full."""
        further = kv_blocks(self._tokens(move), self._size(move)) - move.held
        try:
            move.destination.engine.hold(further)
        except ValueError:
            return False
        move.held += further
        return True

    def _give_back(self, move: _Move) -> None:
        if move.held:
            move.destination.engine.hold(-move.held)
            move.held = 0

    def _end(self, move: _Move, failure: str) -> None:
        self._give_back(move)
        self._leaving.discard(move.name)
        self.under_way -= 1
        for instance in (move.source, move.destination):
            instance.moves -= 1
        move.destination.wake()
        if failure:
            self._fail(move.pair, failure)
        else:
            self._finished(move.pair, True, 1, move.moved)

    def _fail(self, pair: Pair, why: str) -> None:
        self.failed[why] += 1
        self._finished(pair, False, 0, 0)
