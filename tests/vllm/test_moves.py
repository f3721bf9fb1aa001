"""Requests that are moved live between two real instances: their clients see no difference."""

import itertools
from collections.abc import Callable

import pytest

from tests.kit.node import Node
from tests.kit.waves import Wave
from tests.vllm.moved_cases import CASES

pytestmark = pytest.mark.vllm

OF_ONE_WAVE = 4  # more of them, and moves queue until the requests have ended
WAVES = [
    dict(list(CASES.items())[start : start + OF_ONE_WAVE])
    for start in range(0, len(CASES), OF_ONE_WAVE)
]


@pytest.fixture(scope="module")
def waves(whole: Node) -> Callable[[str], Wave]:
    """The wave that has a case, which runs on first use."""
    run: dict[int, Wave] = {}

    def of(case: str) -> Wave:
        number = next(n for n, wave in enumerate(WAVES) if case in wave)
        if number not in run:
            run[number] = Wave(whole, WAVES[number], number)
            run[number].run()
        return run[number]

    return of


@pytest.mark.parametrize("case", CASES)
def test_a_moved_request(node: Node, waves: Callable[[str], Wave], case: str) -> None:
    """Whole and streamed: text, tokens, log-probabilities, reasons for the end, usage."""
    wave = waves(case)
    for pair in wave.pairs[case]:
        choices = {name for name, _, _ in pair.moves}
        assert len(choices) == CASES[case].choices, (pair.moves, pair.refused)
        assert not pair.different(), pair.moves
        shows = CASES[case].shows
        assert all(not shows or choice[shows] for choice in pair.twin.end()["choices"])


def test_moves_send_blocks_and_happen_at_all_positions(
    node: Node, waves: Callable[[str], Wave]
) -> None:
    moves = [
        (position, answer)
        for case in itertools.islice(CASES, 4 * OF_ONE_WAVE)
        for pair in waves(case).pairs[case]
        for _, position, answer in pair.moves
    ]
    assert any(answer["blocks_sent"] for _, answer in moves)
    assert any(position == 0 for position, _ in moves)
    assert len({position for position, _ in moves}) > 5
