"""What a node was started with: its options, and the policies that they and their files name."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isnan
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from llumnix.config import Config, ConfigError
from llumnix.latency import PROFILES, LatencyProfile
from llumnix.plugins import dispatch_policy, planner
from llumnix.policy.decision_context import Terms, Thresholds
from llumnix.policy.dispatch import Policy
from llumnix.policy.priority_classes import NO_CLASSES, PRIORITIES, Classes, PriorityClass
from llumnix.policy.rebalance import Pair, Planner
from llumnix.policy.rescheduler import Pace

if TYPE_CHECKING:  # policies are read before vLLM is
    from vllm.config import VllmConfig

PROFILE, CLASSES = "--latency-profile", "--priority-classes"
# A request may name a class or a number, so a name must not look like one.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WHOLE = ("priority", "headroom_tokens", "target_tokens")
_SECONDS = ("ttft", "tpot")
PREDICTING = ("slo", "interference")  # policies that are nothing without step times

Made = TypeVar("Made")


@dataclass(frozen=True)
class NodeOptions:
    """llumnix's options, vLLM's, and what vLLM made of these; they never change."""

    config: Config
    arguments: argparse.Namespace
    vllm: "VllmConfig"

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        names = self.arguments.served_model_name
        return str(names[0] if names else self.arguments.model)

    @property
    def api_servers(self) -> int:
        """How many API servers the node has; more than one are processes of their own."""
        return self.arguments.api_server_count or 1

    @property
    def root_path(self) -> str:
        """What vLLM's application takes off the beginning of a path."""
        return self.arguments.root_path or ""

    @property
    def by_priority(self) -> bool:
        """Whether the engines' queues go by priority."""
        return bool(self.vllm.scheduler_config.policy == "priority")


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
        raise ConfigError(f"--dispatch-policy {config.dispatch_policy} needs {PROFILE}")
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
        content = _yaml(PROFILE, name)
    except OSError as error:
        names = ", ".join(PROFILES)
        raise ConfigError(f"{PROFILE}: {name} is no file, and not one of {names}") from error
    known = [field.name for field in dataclasses.fields(LatencyProfile)]
    if not isinstance(content, dict) or not set(content) <= set(known):
        raise ConfigError(f"{PROFILE}: {name} must be a mapping with keys of {', '.join(known)}")
    for key, value in content.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < inf:
            raise ConfigError(
                f"{PROFILE}: {name}: {key} must be a number of seconds, not {value!r}"
            )
    return LatencyProfile(**content)


def read_classes(path: str) -> Classes:
    """The classes of a file; none if the path is empty.

    Raises:
        ConfigError: there is no such file, or something in it cannot work.
    """
    if not path:
        return NO_CLASSES
    try:
        content = _yaml(CLASSES, path)
    except OSError as error:
        raise ConfigError(f"{CLASSES}: {path} can't be read: {error.strerror}") from error
    return _checked(f"{CLASSES}: {path}", lambda: _classes(content))


def _classes(content: Any) -> Classes:
    if not isinstance(content, dict) or set(content) != {"classes"}:
        raise ValueError("the file must be a mapping with the one key 'classes'")
    if not isinstance(content["classes"], dict) or not content["classes"]:
        raise ValueError("'classes' must be a mapping of names to classes")
    found: dict[int, PriorityClass] = {}
    for name, values in content["classes"].items():
        made = _class(name, values)
        if (other := found.get(made.priority)) is not None:
            raise ValueError(
                f"the classes {other.name} and {name} have the same priority, {made.priority}"
            )
        found[made.priority] = made
    return Classes(MappingProxyType(found))


def _class(name: Any, values: Any) -> PriorityClass:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a class: use letters, digits, '_' and '-'")
    if not isinstance(values, dict):
        raise ValueError(f"class {name} must be a mapping, such as {{priority: 0}}")
    known = (*_WHOLE, *_SECONDS)
    if unknown := [str(key) for key in values if key not in known]:
        raise ValueError(f"class {name} has no {unknown[0]}; there are {', '.join(known)}")
    if "priority" not in values:
        raise ValueError(f"class {name} has no priority, which is vLLM's: the lower, the sooner")
    _check_numbers(name, values)
    if values["priority"] not in PRIORITIES:
        raise ValueError(f"the priority of class {name} has more than 64 bits")
    return PriorityClass(name, **values)


def _check_numbers(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        kinds, wanted = ((int,), "whole number") if key in _WHOLE else ((int, float), "number")
        if isinstance(value, bool) or not isinstance(value, kinds) or isnan(value):
            raise ValueError(f"{key} of class {name} must be a {wanted}, not {value!r}")
        if key != "priority" and value < 0:
            raise ValueError(f"{key} of class {name} must not be negative, but is {value}")


def _yaml(option: str, path: str) -> Any:
    """What a file holds. Raises OSError, ConfigError."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {path} is no YAML: {' '.join(str(error).split())}") from error


def _checked(option: str, make: Callable[[], Made]) -> Made:
    try:
        return make()
    except ValueError as error:
        raise ConfigError(f"{option}: {error}") from error
