"""llumnixctl watches a drain that the node sees late, or that somebody cancels."""

from typing import Any

import pytest

from llumnix.entrypoints import ctl


class Scripted(ctl.Cluster):
    """A node that lists these drains, one list after the other, and the last one for ever."""

    def __init__(self, *lists: list[ctl.Row]) -> None:
        super().__init__("http://nowhere", None)
        self._lists = list(lists)

    def get(self, path: str) -> Any:
        return self._lists.pop(0) if len(self._lists) > 1 else self._lists[0]

    def post(self, path: str, body: ctl.Row) -> Any:
        return left(2)


def left(number: int) -> ctl.Row:
    names = [f"r{n}" for n in range(number)]
    shown = {"name": "a", "kind": "node", "drained": True, "left": number}
    return {**shown, "requests": names, "stuck": {}}


def drain(cluster: ctl.Cluster) -> list[ctl.Row]:
    return ctl.drain(cluster, ctl.make_parser().parse_args(["drain", "a"]))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctl, "DRAIN_LOOK", 0.01)
    monkeypatch.setattr(ctl, "DRAIN_SHOWN", 0.1)


def test_a_drain_that_the_node_sees_late_was_not_cancelled() -> None:
    (row,) = drain(Scripted([], [], [left(2)], [left(0)]))
    assert row == {"name": "a", "kind": "node", "drained": True, "left": 0}


def test_a_drain_that_the_node_shows_no_more_was_cancelled() -> None:
    with pytest.raises(ctl.CommandError, match="the drain of a was cancelled"):
        drain(Scripted([], [left(2)], []))


def test_a_drain_that_the_node_never_shows_is_not_waited_for() -> None:
    with pytest.raises(ctl.CommandError, match=r"the drain of a does not show after 0\.1 s"):
        drain(Scripted([]))
