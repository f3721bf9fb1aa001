"""Policies by name: those of llumnix, and those that installed packages bring along.

A package names a function in one of two entry-point groups, and its name is an option from then on:

    [project.entry-points."llumnix.dispatch"]        # llumnix.policy.dispatch.Score
    emptiest = "my_package:emptiest"
    [project.entry-points."llumnix.rescheduling"]    # llumnix.policy.rebalance.Planner
    patient = "my_package:patient"
"""

from importlib.metadata import entry_points
from typing import Any

from llumnix.policy.dispatch import Policy
from llumnix.policy.dispatchers import POLICIES
from llumnix.policy.planners import PLANNERS
from llumnix.policy.rebalance import Planner

DISPATCH, RESCHEDULING = "llumnix.dispatch", "llumnix.rescheduling"
NONE = "none"  # the name of no rescheduling at all


def dispatch_policy(name: str) -> Policy:
    """The dispatch policy of that name. Raises ValueError with one sentence that lists the names.

    One of another package is asked for each request anew, unless it is a `Policy` that says else.
    """
    if name in POLICIES:
        return POLICIES[name]
    found = _load(DISPATCH, name, [*POLICIES])
    return found if isinstance(found, Policy) else Policy(found)


def planner(name: str) -> Planner | None:
    """The rule of rescheduling of that name; None for `none`. Raises ValueError likewise."""
    if name == NONE:
        return None
    if name in PLANNERS:
        return PLANNERS[name]
    found: Planner = _load(RESCHEDULING, name, [NONE, *PLANNERS])
    return found


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
