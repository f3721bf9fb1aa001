"""Many requests at once, in pairs: one is moved at random positions, its twin is not."""

import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.kit.moves import Run, differences
from tests.kit.node import Node

USAGE = {"stream": True, "stream_options": {"include_usage": True}}
LONGEST = 300.0  # seconds that a wave may take
EVERY = 0.03  # seconds between two looks at where the requests are


@dataclass
class Case:
    """A request, and how many the engine makes of it."""

    path: str
    body: dict[str, Any]
    choices: int = 1
    shows: str = ""  # what each choice of the answer must have
    streams: bool = True  # vLLM refuses to stream some


@dataclass
class Pair:
    """A request that is moved, and the same one unmoved."""

    moved: Run
    twin: Run
    moves: list[tuple[str, int, Any]] = field(default_factory=list)  # choice, position, answer
    refused: list[str] = field(default_factory=list)

    @property
    def choices(self) -> set[str]:
        """The requests that have moved, one for each choice."""
        return {name for name, _, _ in self.moves}

    def different(self) -> list[str]:
        """Where the client of the moved one got something else."""
        return differences(self.twin.end(), self.moved.end())


class Wave:
    """Runs a few cases, each whole and streamed, and moves one of each pair at random positions."""

    def __init__(self, node: Node, cases: Mapping[str, Case], seed: int) -> None:
        self._node = node
        self._cases = cases
        self._draw = random.Random(seed)
        self._instances = node.instances()
        self.pairs = {
            name: [
                Pair(Run(node, case.path, case.body | how), Run(node, case.path, case.body | how))
                for how in ({}, USAGE)[: 1 + case.streams]
            ]
            for name, case in cases.items()
        }
        self._plans: dict[str, list[int]] = {}  # by request: where it is still to be moved
        self._under_way: dict[str, Future[None]] = {}

    def run(self) -> None:
        """All of them to their ends."""
        all_pairs = [pair for pairs in self.pairs.values() for pair in pairs]
        for pair in all_pairs:
            pair.twin.begin()
            pair.moved.begin()
        deadline = time.monotonic() + LONGEST
        with ThreadPoolExecutor(48) as pool:
            while any(pair.moved.is_alive() for pair in all_pairs):
                assert time.monotonic() < deadline, "the wave hangs"
                for request in self._node.get("/llumnix/requests").json:
                    self._look(pool, all_pairs, request)
                time.sleep(EVERY)
        for move in self._under_way.values():
            move.result()

    def all_moved(self, name: str) -> bool:
        """Whether each choice of a case has moved, whole and streamed."""
        return all(len(pair.choices) == self._cases[name].choices for pair in self.pairs[name])

    def _look(self, pool: ThreadPoolExecutor, pairs: Sequence[Pair], request: Any) -> None:
        name = request["id"]
        pair = next((p for p in pairs if p.moved.mark in name), None)
        busy = self._under_way.get(name)
        if pair is None or (busy is not None and not busy.done()):
            return
        plan = self._plans.setdefault(name, self._positions())
        if plan and request["generated"] >= plan[0]:
            self._under_way[name] = pool.submit(self._move, pair, request, plan)

    def _positions(self) -> list[int]:
        """At the beginning or a little later, and once or twice again."""
        draw = self._draw
        first = draw.choice([0, 1, draw.randrange(2, 10)])
        return [first, first + draw.randrange(1, 20), first + draw.randrange(20, 40)]

    def _move(self, pair: Pair, request: Any, plan: list[int]) -> None:
        others = [i for i in self._instances if i != request["instance"]]
        body = {"request": request["id"], "to": others[0]}
        answer = self._node.post("/llumnix/migrate", body, within=60.0)
        if answer.status == 200:
            pair.moves.append((request["id"], request["generated"], answer.json))
            plan.pop(0)
            return
        pair.refused.append(answer.text)
        if "ended" in answer.text or "no request" in answer.text:
            plan.clear()
        # Else too many are moving at the time, and it is tried again.
