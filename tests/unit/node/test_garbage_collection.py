"""When a node collects all its garbage: not while a thousand open requests would be looked at."""

import asyncio
import gc

import pytest

from llumnix.node.garbage_collection import AT_LAST, DUE, FEW, Garbage
from tests.kit.loop import on_loop


@pytest.mark.parametrize(
    ("passes", "requests", "collects"),
    [
        (DUE - 1, 0, False),
        (DUE, 0, True),
        (DUE, FEW, True),
        (DUE, FEW + 1, False),
        (AT_LAST - 1, 1000, False),
        (AT_LAST, 1000, True),
    ],
)
def test_it_waits_for_few_requests_but_not_for_ever(
    passes: int, requests: int, collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(gc, "get_count", lambda: (0, 0, passes))
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    Garbage(lambda: requests).look()
    assert bool(collected) is collects


def test_a_crowd_that_has_just_gone_is_not_all_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []
    monkeypatch.setattr(gc, "get_count", lambda: (0, 0, DUE))
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    counts = iter((1000, 0, 0))
    watcher = Garbage(lambda: next(counts))
    watcher.look()
    watcher.look()
    assert not collected
    watcher.look()
    assert collected


@on_loop
async def test_python_makes_no_full_collection_while_it_is_watched() -> None:
    before = gc.get_threshold()
    watching = asyncio.create_task(Garbage(lambda: 1000).watch())
    await asyncio.sleep(0)
    full = gc.get_stats()[2]["collections"]
    kept = [[number] for number in range(200_000)]  # for which Python would make several
    assert gc.get_stats()[2]["collections"] == full and gc.get_count()[2] > DUE
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert gc.get_threshold() == before and len(kept) == 200_000
