"""Policies by name, those of other packages among them."""

from collections.abc import Callable
from importlib.metadata import EntryPoint
from math import inf, nan
from typing import Any

import pytest

from llumnix import plugins
from llumnix.cluster import ClusterView, InstanceInfo, InstanceLoad, InstanceState
from llumnix.plugins import PLANNERS, POLICIES
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import Candidate, Policy, Request
from llumnix.policy.rebalance import Pair

Installed = Callable[..., None]


def emptiest(candidate: Candidate, request: Request, terms: Terms) -> float:
    return -candidate.load.used_blocks


def patient(*facts: object) -> list[Pair]:
    return []


def broken(*facts: object) -> float:
    raise KeyError("a")


def no_number(*facts: object) -> float:
    return nan


def failing(*facts: object) -> list[Pair]:
    raise KeyError("a")


def unknown(*facts: object) -> list[Pair]:
    return [Pair("a", "b", "shortest")]


def to_itself(*facts: object) -> list[Pair]:
    return [Pair("a", "a")]


def partly(*facts: object) -> list[Pair]:
    return [Pair("a", "b"), Pair("c", "c"), Pair("c", "d")]


def none_at_all(*facts: object) -> list[Any]:
    return [("a", "b", "")]


KEPT = Policy(emptiest, keeps=True)
NUMBER = 7


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Have a package installed that names its policies."""

    def install(group: str, name: str, value: str) -> None:
        entry = EntryPoint(name, f"{__name__}:{value}", group)
        found: Any = lambda group="": [entry] if group == entry.group else []  # noqa: E731
        monkeypatch.setattr(plugins, "entry_points", found)

    return install


def test_ours_have_their_names() -> None:
    assert {name: plugins.dispatch_policy(name) for name in POLICIES} == dict(POLICIES)
    assert {name: plugins.planner(name) for name in PLANNERS} == dict(PLANNERS)
    assert plugins.planner("none") is None


INFO = InstanceInfo("i", "n", "m", InstanceState.READY, 100, 16)
USED = Candidate(INFO, InstanceLoad("i", used_blocks=30))


def test_a_function_of_another_package_is_asked_for_each_request(installed: Installed) -> None:
    installed(plugins.DISPATCH, "emptiest", "emptiest")
    found = plugins.dispatch_policy("emptiest")
    assert found.score(USED, Request(), Terms()) == -30 and not found.keeps


def test_a_package_may_say_that_its_scores_keep(installed: Installed) -> None:
    installed(plugins.DISPATCH, "kept", "KEPT")
    found = plugins.dispatch_policy("kept")
    assert found.score(USED, Request(), Terms()) == -30 and found.keeps


@pytest.mark.parametrize("value", ["broken", "no_number"])
def test_a_policy_that_fails_ranks_an_instance_last(
    installed: Installed, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    installed(plugins.DISPATCH, value, value)
    score = plugins.dispatch_policy(value).score
    assert [score(USED, Request(), Terms()) for _ in range(2)] == [-inf, -inf]
    assert len(caplog.records) == (value == "broken"), "it is told once"


def test_a_rule_of_rescheduling_of_another_package(installed: Installed) -> None:
    installed(plugins.RESCHEDULING, "patient", "patient")
    found = plugins.planner("patient")
    assert found is not None and found(ClusterView(), Terms(), lambda pair: True) == []


@pytest.mark.parametrize("value", ["failing", "unknown", "to_itself", "none_at_all"])
def test_a_rule_that_fails_names_nothing(
    installed: Installed, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    installed(plugins.RESCHEDULING, value, value)
    found = plugins.planner(value)
    assert found is not None and found(ClusterView(), Terms(), lambda pair: True) == []
    assert f"the policy {value} fails" in caplog.text


def test_the_other_pairs_of_a_round_are_kept(installed: Installed) -> None:
    installed(plugins.RESCHEDULING, "partly", "partly")
    found = plugins.planner("partly")
    assert found is not None
    assert found(ClusterView(), Terms(), lambda pair: True) == [Pair("a", "b"), Pair("c", "d")]


def test_an_unknown_name_is_told_the_known_ones(installed: Installed) -> None:
    installed(plugins.DISPATCH, "emptiest", "emptiest")
    with pytest.raises(ValueError, match=r"no policy 'best' for dispatch; .*artifact, emptiest$"):
        plugins.dispatch_policy("best")
    with pytest.raises(ValueError, match="no policy 'best' for rescheduling; there are none, "):
        plugins.planner("best")


@pytest.mark.parametrize(("value", "why"), [("missing", "can't be loaded"), ("NUMBER", "function")])
def test_what_is_no_policy(installed: Installed, value: str, why: str) -> None:
    installed(plugins.DISPATCH, "broken", value)
    with pytest.raises(ValueError, match=why):
        plugins.dispatch_policy("broken")
