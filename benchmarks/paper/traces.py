"""What comes: the rows of the paper's Fig. 11, with the rates and thresholds of its artifact."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from llumnix.simulator.cluster import EngineConfig
from llumnix.simulator.distributions import ArrivalProcess
from llumnix.simulator.traces import FORMATS
from llumnix.simulator.workload import Trace, Workload

LONGEST = EngineConfig().max_model_len  # tokens of prompt and output; longer ones are cut


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of requests, at any rate."""

    prompt: str = ""  # a key of lengths.PROMPTS
    output: str = ""  # a key of lengths.OUTPUTS
    file: str = ""  # a trace of Azure's, with its own times; stretched to the rate
    rates: tuple[float, ...] = ()  # requests a second: the reference's lowest, middle and highest
    guess: float = 0.0  # where a search for another rate begins
    threshold: float = 3.0  # freeness, blocks a request

    def workload(
        self,
        requests: int,
        rate: float,
        folder: Path | None = None,
        cv: float | None = None,
        high: float = 0.0,
    ) -> Workload:
        """So many requests at a rate; `high` is the share of those with a high priority."""
        if self.file:
            assert folder is not None
            file = str(folder / self.file)
            count = min(requests, len(FORMATS["azure"].read(file)))
            return Workload(count, trace=Trace(file, "azure", rate), max_tokens=LONGEST)
        return Workload(
            requests,
            ArrivalProcess("poisson" if cv is None else "gamma", rate, cv),
            self.prompt,
            self.output,
            priorities={-1: high} if high else {},
            max_tokens=LONGEST,
        )

    def missing(self, folder: Path | None) -> bool:
        """Whether its file is not there."""
        return bool(self.file) and not (folder and (folder / self.file).is_file())


ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "S-S": Row("short", "short", rates=(32, 34, 36), guess=51),
        "M-M": Row("medium", "medium", rates=(7.4, 7.6, 7.8), guess=8.4, threshold=10),
        "L-L": Row("long", "long", rates=(2.6, 2.8, 3.0), guess=3.1),
        "S-L": Row("short", "long", rates=(4.1, 4.2, 4.3), guess=4.2, threshold=10),
        "L-S": Row("long", "short", rates=(10, 14, 18), guess=22),
        "ShareGPT": Row("sharegpt", "sharegpt", guess=9.8),
        "BurstGPT": Row("burstgpt", "burstgpt", guess=10.6),
        "Azure conversation": Row(file="azure2023_conv.csv", guess=10),
        "Azure code": Row(file="azure2023_code.csv", guess=4),
    }
)
