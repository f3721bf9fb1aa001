"""Policies by name: those of llumnix, and those that installed packages bring along.

A package names a function in one of two entry-point groups, and its name is an option from then on:

    [project.entry-points."llumnix.dispatch"]        # llumnix.policy.dispatch.Score
    emptiest = "my_package:emptiest"
    [project.entry-points."llumnix.rescheduling"]    # llumnix.policy.rebalance.Planner
    patient = "my_package:patient"
"""

import functools
import logging
from collections.abc import Mapping
from importlib.metadata import entry_points
from math import inf, isnan
from types import MappingProxyType
from typing import Any

from llumnix.cluster import ClusterView
from llumnix.policy.artifact import artifact, by_artifact
from llumnix.policy.decision_context import Terms
from llumnix.policy.dispatch import (
    Candidate,
    Policy,
    Request,
    Score,
    by_chance,
    by_count,
    by_freeness,
    by_interference,
    by_load,
    by_memory,
    by_queue,
    by_turn,
)
from llumnix.policy.queues import lookahead, queues
from llumnix.policy.rebalance import Allowed, Pair, Planner, pairs
from llumnix.policy.request_choice import RULES
from llumnix.policy.slo import by_slo

logger = logging.getLogger(__name__)

DISPATCH, RESCHEDULING = "llumnix.dispatch", "llumnix.rescheduling"
NONE = "none"  # the name of no rescheduling at all

# A policy of dispatch is one function (`dispatch.Score`) and one line here.
POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "load": Policy(by_load, keeps=True),
        "freeness": Policy(by_freeness, keeps=True),
        "memory": Policy(by_memory, keeps=True),
        "queue": Policy(by_queue, keeps=True),
        "balanced": Policy(by_count, keeps=True, alone=True),
        "rr": Policy(by_turn, keeps=True, alone=True),
        "random": Policy(by_chance, keeps=True, alone=True),
        "slo": Policy(by_slo),
        "interference": Policy(by_interference),
        "artifact": Policy(by_artifact, keeps=True),
    }
)

# A rule of rescheduling is one function (`rebalance.Planner`) and one line here.
PLANNERS: Mapping[str, Planner] = MappingProxyType(
    {
        "llumnix": pairs,
        "artifact": artifact,
        "lookahead": lookahead,
        "queues": queues,
    }
)


def dispatch_policy(name: str) -> Policy:
    """The dispatch policy of that name. Raises ValueError with one sentence that lists the names.

    One of another package is asked for each request anew, unless it is a `Policy` that says else.
    """
    if name in POLICIES:
        return POLICIES[name]
    found = _load(DISPATCH, name, [*POLICIES])
    made = found if isinstance(found, Policy) else Policy(found)
    return made._replace(score=_guarded_score(name, made.score))


def planner(name: str) -> Planner | None:
    """The rule of rescheduling of that name; None for `none`. Raises ValueError likewise."""
    if name == NONE:
        return None
    if name in PLANNERS:
        return PLANNERS[name]
    found: Planner = _load(RESCHEDULING, name, [NONE, *PLANNERS])
    return _guarded_planner(name, found)


def _guarded_score(name: str, score: Score) -> Score:
    """The score of another package's policy; the worst of all when that fails, or is no number."""

    def call(candidate: Candidate, request: Request, terms: Terms) -> float:
        try:
            value = float(score(candidate, request, terms))
        except Exception:
            _tell_once(name)
            return -inf
        return -inf if isnan(value) else value

    return call


def _guarded_planner(name: str, planner: Planner) -> Planner:
    """A rule of another package; it names nothing when it fails."""

    def call(view: ClusterView, terms: Terms, allowed: Allowed) -> list[Pair]:
        good = []
        try:
            for pair in planner(view, terms, allowed):
                try:
                    good.append(_checked(pair))
                except (TypeError, ValueError):
                    _tell_once(name)
        except Exception:
            _tell_once(name)
        return good

    return call


def _checked(pair: Pair) -> Pair:
    """Raises TypeError, ValueError for one that nothing can be done with."""
    if not isinstance(pair, Pair):
        raise TypeError(f"a rule of rescheduling names a {type(pair).__name__}, and no Pair")
    if pair.source == pair.destination or pair.rule not in ("", *RULES):
        raise ValueError(f"nothing can be moved by {pair}; rules are {', '.join(RULES)}")
    return pair


@functools.cache
def _tell_once(name: str) -> None:
    """A policy that fails does so for each candidate of each request."""
    logger.exception("the policy %s fails; this is logged once", name)


def _load(group: str, name: str, ours: list[str]) -> Any:
    """What an entry point names; any object, as packages are not typed by us."""
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        names = ", ".join([*ours, *sorted(found)])
        raise ValueError(f"no policy {name!r} for {group.partition('.')[2]}; there are {names}")
    what = f"{name!r} ({found[name].value})"
    try:
        loaded = found[name].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the policy {what} can't be loaded: {error}") from error
    if not callable(loaded) and not isinstance(loaded, Policy):
        raise ValueError(f"the policy {what} is no function")
    return loaded
