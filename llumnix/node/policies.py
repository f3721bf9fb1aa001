"""What a node decides by, as its configuration says: policies by name, and their terms."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TypeVar

import yaml

from llumnix.config import Config, ConfigError
from llumnix.latency import PROFILES, LatencyProfile
from llumnix.node.priority_classes import read_classes
from llumnix.plugins import dispatch_policy, planner
from llumnix.policy.decision_context import Terms, Thresholds
from llumnix.policy.dispatch import Policy
from llumnix.policy.rebalance import Pair, Planner
from llumnix.policy.rescheduler import Pace

OPTION = "--latency-profile"
PREDICTING = ("slo", "interference")  # policies that are nothing without step times

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Policies:
    """The rules of one node, the same on all nodes of a cluster."""

    dispatch: Policy
    planner: Planner | None  # None: nothing is moved to balance or to empty an instance
    terms: Terms
    pace: Pace


def read_policies(config: Config) -> Policies:
    """All of them. Raises ConfigError with one sentence."""
    thresholds = _checked(
        "--migration-out-below",
        lambda: Thresholds(config.migration_out_below, config.migration_in_above),
    )
    classes, latency = read_classes(config.priority_classes), read_profile(config.latency_profile)
    if config.dispatch_policy in PREDICTING and latency == LatencyProfile():
        raise ConfigError(f"--dispatch-policy {config.dispatch_policy} needs {OPTION}")
    targets = [c for c in classes.by_priority.values() if min(c.ttft, c.tpot) < inf]
    if config.dispatch_policy == "slo" and not targets:
        raise ConfigError("--dispatch-policy slo needs --priority-classes with a ttft or a tpot")
    return Policies(
        _checked("--dispatch-policy", lambda: dispatch_policy(config.dispatch_policy)),
        _checked(
            "--migration-policy",
            lambda: planner(config.migration_policy) or no_pairs if config.migration else None,
        ),
        Terms(thresholds, classes, latency),
        _checked("--migration-max-requests", lambda: Pace(config.migration_max_requests)),
    )


def no_pairs(*facts: object) -> list[Pair]:
    """The rule `none`: nobody gives, but for instances that are emptied."""
    return []


def read_profile(name: str) -> LatencyProfile:
    """The profile of that name, or of a YAML file with its coefficients, in seconds.

    Raises ConfigError: there is neither, or the file has something else in it.
    """
    if not name:
        return LatencyProfile()
    if name in PROFILES:
        return PROFILES[name]
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(PROFILES)
        raise ConfigError(f"{OPTION}: {name} is no file, and not one of {names}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{OPTION}: {name} is no YAML: {' '.join(str(error).split())}") from error
    known = [field.name for field in dataclasses.fields(LatencyProfile)]
    if not isinstance(content, dict) or not set(content) <= set(known):
        raise ConfigError(f"{OPTION}: {name} must be a mapping with keys of {', '.join(known)}")
    for key, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < inf:
            raise ConfigError(f"{OPTION}: {name}: {key} must be a number of seconds, not {value!r}")
    return LatencyProfile(**content)


def _checked(option: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
