"""A workload: which requests come in a run, from distributions or from a trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from math import inf
from typing import Literal, NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from llumnix.simulator.distributions import (
    OUTPUTS,
    PROMPTS,
    ArrivalProcess,
    Fixed,
    Lengths,
)
from llumnix.simulator.schema import SimConfigError
from llumnix.simulator.traces import FORMATS, Recorded


class SimJob(NamedTuple):
    """One request: when it comes, and how long it is."""

    number: int  # 0, 1, … in the order of arrival
    at: float  # seconds from the beginning
    prompt: int  # tokens
    output: int  # tokens, at least 1
    priority: int = 0  # vLLM's: the lower, the sooner
    hashes: tuple[int, ...] = ()  # of the prompt's blocks, where the trace has them
    block: int = 0  # tokens in each of these blocks


# A name of PROMPTS or OUTPUTS, a fixed number of tokens, or a distribution.
LengthsOption = str | int | Lengths


@dataclass(frozen=True, slots=True)
class Trace:
    """A file of recorded requests. Raises ValueError if the rate is not positive."""

    file: str
    format: Literal["azure", "mooncake", "lengths"]
    rate: float | None = None  # requests a second; time is stretched so that it is their average

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate < inf:
            raise ValueError("rate must be greater than 0, and finite")


@dataclass(frozen=True, slots=True)
class Workload:
    """What comes: lengths of prompts and outputs, drawn independently, or those of a trace.

    `arrivals` says when. A trace with times may do without; if both are there, `arrivals` counts.

    `max_tokens` is for prompt and output together; a request with more could never run, and so it
    must not exceed the KV cache of an instance. What `too_long` says of longer ones:

    - cut: the output ends there, as in vLLM. A prompt that leaves no room for an output is cut
      too, to one token less.
    - resample: it gets the lengths of another request of the workload that is short enough. In a
      trace that has hashes it then has none.

    Raises:
        ValueError: what is given is too much or too little, or out of range.
    """

    requests: int | None = None  # in all; of a trace the first ones, all by default
    arrivals: ArrivalProcess | None = None
    prompt: LengthsOption | None = None
    output: LengthsOption | None = None
    trace: Trace | None = None
    priorities: Mapping[int, float] = field(default_factory=dict)  # shares
    max_tokens: int | None = None
    too_long: Literal["cut", "resample"] = "cut"

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests < 1:
            raise ValueError("requests must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError("max_tokens must be at least 2, for a prompt and an output")
        shares = self.priorities.values()
        if min(shares, default=0.0) < 0 or sum(shares) > 1 + 1e-9:
            raise ValueError("priorities must be shares that add up to 1 at most")
        if not all(-(2**63) <= priority < 2**63 for priority in self.priorities):
            raise ValueError("priorities must be whole numbers of 64 bits")
        for name in ("prompt", "output"):
            if isinstance(tokens := getattr(self, name), int):
                Fixed(tokens)
        if self.trace is None:
            self._check_lengths()
        else:
            self._check_trace(self.trace)

    def _check_lengths(self) -> None:
        for name in ("requests", "arrivals", "prompt", "output"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing (or a trace)")

    def _check_trace(self, trace: Trace) -> None:
        if self.prompt is not None or self.output is not None:
            raise ValueError("prompt and output have their lengths from the trace, if there is one")
        if self.arrivals is None and not FORMATS[trace.format].timed:
            raise ValueError(f"arrivals is missing: a {trace.format} trace has no times")
        if self.arrivals and trace.rate:
            raise ValueError("rate of the trace and arrivals exclude each other")


class Generated(NamedTuple):
    """The requests of one seed."""

    jobs: list[SimJob]  # in the order of arrival
    too_long: int  # of them that were cut or resampled


class _RandomStream(IntEnum):
    """Everything random has a stream of its own, so that a change of one leaves the others."""

    PROMPTS = 0
    OUTPUTS = 1
    ARRIVALS = 2
    PRIORITIES = 3
    RESAMPLING = 4

    def of(self, seed: int) -> Generator:
        return default_rng([seed, self])


def generate(workload: Workload, seed: int) -> Generated:
    """The requests of a workload; the same for the same seed (0 or more).

    Raises:
        SimConfigError: a file cannot be read, has too few requests, or none that is short enough.
    """
    recorded = _traced(workload) if workload.trace else _drawn(workload, seed)
    fitting, too_long = _fit(recorded, workload, seed)
    times = _times(fitting, workload, seed)
    priorities = _priorities(len(fitting), workload.priorities, seed)
    jobs = [
        SimJob(number, at, one.prompt, one.output, priority, one.hashes, one.block)
        for number, (one, at, priority) in enumerate(zip(fitting, times, priorities, strict=True))
    ]
    return Generated(jobs, too_long)


def _drawn(workload: Workload, seed: int) -> list[Recorded]:
    assert workload.requests and workload.prompt is not None and workload.output is not None
    prompts = _lengths("prompt", workload.prompt, PROMPTS)
    outputs = _lengths("output", workload.output, OUTPUTS)
    pairs = zip(
        prompts.draw(workload.requests, _RandomStream.PROMPTS.of(seed)).tolist(),
        outputs.draw(workload.requests, _RandomStream.OUTPUTS.of(seed)).tolist(),
        strict=True,
    )
    return [Recorded(0.0, prompt, output) for prompt, output in pairs]


def _lengths(key: str, option: LengthsOption, named: Mapping[str, Lengths]) -> Lengths:
    if isinstance(option, int):
        return Fixed(option)
    if not isinstance(option, str):
        return option
    if option not in named:
        raise SimConfigError(f"{key} is {option!r}, and must be of {sorted(named)}")
    return named[option]


def _traced(workload: Workload) -> list[Recorded]:
    assert workload.trace
    recorded = FORMATS[workload.trace.format].read(workload.trace.file)
    count = workload.requests or len(recorded)
    if not 0 < count <= len(recorded):
        raise SimConfigError(f"{workload.trace.file} has {len(recorded)} requests, not {count}")
    # vLLM takes no empty prompt and ends no request without a token.
    return [
        one._replace(prompt=max(one.prompt, 1), output=max(one.output, 1))
        for one in recorded[:count]
    ]


def _fit(recorded: list[Recorded], workload: Workload, seed: int) -> tuple[list[Recorded], int]:
    """The requests with at most `max_tokens`, and how many had more."""
    limit = workload.max_tokens
    if limit is None:
        return recorded, 0
    fits = [one for one in recorded if one.prompt + one.output <= limit]
    too_long = len(recorded) - len(fits)
    if not too_long:
        return recorded, 0
    if workload.too_long == "cut":
        return [_cut(one, limit) for one in recorded], too_long
    if not fits:
        raise SimConfigError(f"max_tokens is {limit}, and every request is longer")
    others = iter(_RandomStream.RESAMPLING.of(seed).integers(len(fits), size=too_long).tolist())
    return [
        one
        if one.prompt + one.output <= limit
        else fits[next(others)]._replace(at=one.at, hashes=(), block=0)
        for one in recorded
    ], too_long


def _cut(one: Recorded, limit: int) -> Recorded:
    prompt = min(one.prompt, limit - 1)
    blocks = -(-prompt // one.block) if one.block else 0
    output = min(one.output, limit - prompt)
    return one._replace(prompt=prompt, output=output, hashes=one.hashes[:blocks])


def _times(recorded: list[Recorded], workload: Workload, seed: int) -> list[float]:
    """Seconds at which they come."""
    if workload.arrivals:
        drawn = workload.arrivals.times(len(recorded), _RandomStream.ARRIVALS.of(seed))
        return list(drawn.tolist())
    assert workload.trace
    stretch, last = 1.0, recorded[-1].at
    if workload.trace.rate and last > 0:
        stretch = (len(recorded) - 1) / workload.trace.rate / last
    return [one.at * stretch for one in recorded]


def _priorities(count: int, shares: Mapping[int, float], seed: int) -> list[int]:
    """One for each request, independently; what the shares leave is of priority 0."""
    if not shares:
        return [0] * count
    drawn = _RandomStream.PRIORITIES.of(seed).random(count)
    bounds = np.cumsum(list(shares.values()))
    names = [*shares, 0]
    return [names[place] for place in np.searchsorted(bounds, drawn, side="right").tolist()]
