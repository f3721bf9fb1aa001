"""The judge finds each way in which a stream can be wrong."""

import pytest

from tests.chaos.judge import Verdict, right_answer

RIGHT = right_answer(range(3, 40), 50, 49152, 2)


@pytest.mark.parametrize(
    "stream, lost, doubled, wrong",
    [
        (RIGHT, 0, 0, 0),
        (RIGHT[:10] + RIGHT[13:], 3, 0, 0),
        (RIGHT[:10] + RIGHT[6:], 0, 4, 0),
        ([*RIGHT[:10], 1, *RIGHT[11:]], 0, 0, 1),
        (RIGHT[:45], 5, 0, 0),
        ([*RIGHT, RIGHT[-1]], 0, 1, 0),
    ],
    ids=["right", "lost", "doubled", "wrong", "short", "too long"],
)
def test_each_is_counted(stream: list[int], lost: int, doubled: int, wrong: int) -> None:
    for size in (1, 7):
        verdict = Verdict(RIGHT)
        for start in range(0, len(stream), size):
            verdict.take(stream[start : start + size])
        verdict.end()
        assert (verdict.lost, verdict.doubled, verdict.wrong) == (lost, doubled, wrong)
        assert verdict.good == (stream == RIGHT)
