"""What a check of moves on GPUs takes for wrong."""

from typing import Any

from benchmarks.gpu_check import fast, same, told


def _found(gap: float, slower: float) -> dict[str, Any]:
    row = {"context": 256, "how": "live", "gap": gap, "step": 0.005, "seconds": 0.05}
    other = row | {"how": "recompute", "gap": 1.0}
    return {"gaps": [row, other], "slow_down": {"slow_down": {"source": slower}}}


def test_a_fast_move_passes() -> None:
    found = _found(0.010, 0.01)
    assert fast(found, 2.5) == []
    assert told(found) == "256 tokens: 10.0 ms (2.0 steps), move 50 ms; others +1.0%"


def test_a_gap_and_a_slow_down_are_bounded() -> None:
    assert fast(_found(0.016, 0.01), 2.5) == ["a gap of 3.2 steps at 256 tokens, over 2.5"]
    assert fast(_found(0.010, 0.06), 2.5) == ["steps at the source are 6.0% longer, over 5%"]


def test_all_tokens_must_be_the_same() -> None:
    assert same({"identity": {"requests": 8, "moved": 8}}) == []
    assert same({"identity": {"requests": 8, "moved": 7}}) == [
        "7 of 8 requests gave the same tokens"
    ]
