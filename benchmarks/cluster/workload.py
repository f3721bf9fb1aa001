"""What is offered in one run: when requests come, and how long prompts and outputs are."""

from dataclasses import dataclass
from typing import NamedTuple

from numpy.random import default_rng

from llumnix.simulator.distributions import (
    OUTPUTS,
    PROMPTS,
    ArrivalProcess,
    Fixed,
    Lengths,
    PowerLaw,
)
from llumnix.simulator.traces import read_lengths
from llumnix.simulator.workload import LengthsOption, Workload, generate

SIZES = {"S": "short", "M": "medium", "L": "long"}
_ROWS, _GAPS = 10, 11  # streams of a seed, apart from the simulator's own


class Planned(NamedTuple):
    """One request: when it is to be sent, in seconds from the beginning, and its tokens."""

    at: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Shape:
    """How long requests are.

    `name` is two of S, M and L, for prompts and outputs of the paper's power laws ("M-L");
    sharegpt or burstgpt, for the quantiles that the paper gives of them; fixed:IN,OUT; or a CSV
    file with the columns input_tokens and output_tokens, whose rows are drawn at random.
    """

    name: str

    def __post_init__(self) -> None:
        if not self.is_file:
            self._lengths(8)

    @property
    def is_file(self) -> bool:
        """Whether the lengths are those of a file's rows."""
        return self.name.endswith(".csv")

    @property
    def label(self) -> str:
        """Its name in tables: of a file the last part."""
        return self.name.rsplit("/", 1)[-1].removesuffix(".csv")

    def requests(
        self, rate: float, cv: float, count: int, seed: int, longest: int
    ) -> list[Planned]:
        """So many requests, the same for the same seed; prompt and output fit into `longest`."""
        arrivals = _arrivals(rate, cv)
        if self.is_file:
            return self._drawn(arrivals, count, seed, longest)
        prompts, outputs = self._lengths(longest)
        workload = Workload(count, arrivals, prompts, outputs, max_tokens=longest)
        return [Planned(job.at, job.prompt, job.output) for job in generate(workload, seed).jobs]

    def _drawn(
        self, arrivals: ArrivalProcess, count: int, seed: int, longest: int
    ) -> list[Planned]:
        rows = [(max(row.prompt, 1), max(row.output, 1)) for row in read_lengths(self.name)]
        # A row that is too long would have to be cut to something that nobody has asked for.
        fitting = [row for row in rows if sum(row) <= longest]
        if not fitting:
            raise ValueError(f"{self.name} has no request of at most {longest} tokens")
        places = default_rng([seed, _ROWS]).integers(len(fitting), size=count).tolist()
        times = arrivals.times(count, default_rng([seed, _GAPS])).tolist()
        return [Planned(at, *fitting[place]) for at, place in zip(times, places, strict=True)]

    def _lengths(self, longest: int) -> tuple[LengthsOption, LengthsOption]:
        if self.name.startswith("fixed:"):
            prompt, output = self.name.removeprefix("fixed:").split(",")
            return Fixed(int(prompt)), Fixed(int(output))
        if self.name in PROMPTS:
            return self.name, self.name
        first, _, second = self.name.partition("-")
        if first not in SIZES or second not in SIZES:
            raise ValueError(f"{self.name!r} is no shape: M-M, sharegpt, fixed:IN,OUT or a CSV")
        return _capped(PROMPTS[SIZES[first]], longest), _capped(OUTPUTS[SIZES[second]], longest)


def _capped(lengths: Lengths, longest: int) -> PowerLaw:
    """A power law of which a prompt leaves room for an output, where models are short."""
    assert isinstance(lengths, PowerLaw)
    return PowerLaw(lengths.mean, lengths.alpha, min(lengths.cap, longest * 3 // 4))


def _arrivals(rate: float, cv: float) -> ArrivalProcess:
    if rate == float("inf"):
        return ArrivalProcess("burst")
    return ArrivalProcess("poisson", rate) if cv == 1 else ArrivalProcess("gamma", rate, cv)
