"""Requests that are moved live between two real instances: their clients see no difference."""

import itertools
from collections.abc import Callable

import pytest

from tests.kit.node import Node
from tests.kit.waves import Pair, Wave
from tests.system.vllm.moved_cases import CASES

pytestmark = pytest.mark.vllm

OF_ONE_WAVE = 4  # more of them, and moves queue until the requests have ended
# vLLM 0.32 can leave the thinking budget of a request that has ended to one without any, which then
# takes over its place in the batch: so those with a budget are among themselves.
BUDGETED = {name for name, case in CASES.items() if "thinking_token_budget" in case.body}
OTHERS = [name for name in CASES if name not in BUDGETED]
WAVES = [
    {name: CASES[name] for name in names}
    for names in (
        *(OTHERS[n : n + OF_ONE_WAVE] for n in range(0, len(OTHERS), OF_ONE_WAVE)),
        BUDGETED,
    )
]
TRIES = 3  # for a case: on a machine that is busy otherwise, moves are given up for want of time


@pytest.fixture(scope="module")
def waves(whole: Node) -> Callable[[str], list[Pair]]:
    """The pairs of a case, from the wave that has it and runs on first use."""
    pairs: dict[str, list[Pair]] = {}

    def of(name: str) -> list[Pair]:
        number = next(n for n, wave in enumerate(WAVES) if name in wave)
        left = {case: WAVES[number][case] for case in WAVES[number] if case not in pairs}
        for again in range(TRIES):
            if left:
                wave = Wave(whole, left, len(WAVES) * again + number)
                wave.run()
                pairs.update(wave.pairs)
                left = {case: left[case] for case in left if not wave.all_moved(case)}
                for case in left:
                    assert not any(pair.different() for pair in wave.pairs[case]), case
        return pairs[name]

    return of


@pytest.mark.parametrize("case", CASES)
def test_a_moved_request(node: Node, waves: Callable[[str], list[Pair]], case: str) -> None:
    """Whole and streamed: text, tokens, log-probabilities, reasons for the end, usage."""
    for pair in waves(case):
        assert len(pair.choices) == CASES[case].choices, (pair.moves, pair.refused)
        assert not pair.different(), pair.moves
        shows = CASES[case].shows
        assert all(not shows or choice[shows] for choice in pair.twin.end()["choices"])


def test_moves_send_blocks_and_happen_at_all_positions(
    node: Node, waves: Callable[[str], list[Pair]]
) -> None:
    moves = [
        (position, answer)
        for case in itertools.islice(CASES, 4 * OF_ONE_WAVE)
        for pair in waves(case)
        for _, position, answer in pair.moves
    ]
    assert any(answer["blocks_sent"] for _, answer in moves)
    assert any(position == 0 for position, _ in moves)
    assert len({position for position, _ in moves}) > 5
