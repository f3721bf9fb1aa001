"""A configuration file: which workload meets which cluster, and with which seeds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Any

import orjson
import yaml

from llumnix.simulator.cluster import ClusterConfig
from llumnix.simulator.schema import SimConfigError, build
from llumnix.simulator.workload import Generated, Workload, generate


@dataclass(frozen=True, slots=True)
class SimConfig:
    """What is to be run, once for each seed."""

    workload: Workload
    cluster: ClusterConfig
    seeds: tuple[int, ...]
    tokens: bool  # whether the record of a run has the time of every token
    given: Mapping[str, Any]  # the file's content, to be recorded

    def requests(self, seed: int) -> Generated:
        """The requests of one run.

        Raises:
            SimConfigError: they cannot be made, or there is one that no instance could take.
        """
        made = generate(self.workload, seed)
        longest = max(job.prompt + job.output for job in made.jobs)
        limit = self.cluster.engine.max_model_len
        if longest > limit:
            raise SimConfigError(
                f"a request has {longest} tokens, more than cluster.engine.max_model_len, {limit}: "
                "workload.max_tokens can cut it"
            )
        return made


@dataclass(frozen=True, slots=True)
class _File:
    """The keys of the file. Raises ValueError if the seeds make no sense."""

    workload: Workload
    cluster: ClusterConfig
    seed: int | None = None
    seeds: tuple[int, ...] = ()
    tokens: bool = True

    def __post_init__(self) -> None:
        if self.seed is not None and self.seeds:
            raise ValueError("seed and seeds exclude each other")
        check_seeds(self.seeds if self.seed is None else (self.seed,))


def check_seeds(seeds: tuple[int, ...]) -> None:
    """Raises ValueError if a seed is out of range, or there twice."""
    if not all(0 <= seed < 2**63 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}, and must differ, and be from 0 to 2^63 - 1")


def read_config(file: Path) -> SimConfig:
    """A configuration file, in YAML.

    Paths in it (keys `file`) are taken from the folder that it is in.

    Raises:
        SimConfigError: it cannot be read, or something in it is missing, unknown or wrong.
    """
    given = _load(file)
    try:
        if isinstance(given, Mapping) and "workload" in given:
            given = {**given, "workload": _anchored(given["workload"], file.parent)}
        read = build(_File, given, "")
        orjson.dumps(given, option=orjson.OPT_NON_STR_KEYS)  # as it will be recorded
    except SimConfigError:
        raise
    except RecursionError as error:
        raise SimConfigError(f"{file} has a value that contains itself") from error
    except (TypeError, ValueError) as error:
        raise SimConfigError(f"{file} cannot be recorded as JSON: {error}") from error
    return SimConfig(
        workload=read.workload,
        cluster=read.cluster,
        seeds=read.seeds or (read.seed or 0,),
        tokens=read.tokens,
        given=given,
    )


class _Loader(yaml.SafeLoader):
    """YAML without dates and nan, which no key of ours takes; they are texts here.

    A table of its own, as other libraries change that of SafeLoader for the whole process.
    """

    def _number(self, node: yaml.ScalarNode) -> float | str:
        number = self.construct_yaml_float(node)
        return str(node.value) if isnan(number) else number


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = "tag:yaml.org,2002:float"
_Loader.add_constructor(_FLOAT, _Loader._number)
# PyYAML, which follows YAML 1.1, takes 1e-3 for a text: it wants 1.0e-3.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+0123456789"))


def _load(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SimConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SimConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from error


def _anchored(given: Any, folder: Path) -> Any:
    """The same with paths that hold from anywhere."""
    if not isinstance(given, Mapping):
        return given
    return {
        key: str(folder / one) if key == "file" and isinstance(one, str) else _anchored(one, folder)
        for key, one in given.items()
    }
