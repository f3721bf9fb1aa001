"""A request as a workload makes it, before any engine has seen it."""

from typing import NamedTuple


class SimJob(NamedTuple):
    """One request: when it comes, and how long it is."""

    number: int  # 0, 1, … in the order of arrival
    at: float  # seconds from the beginning
    prompt: int  # tokens
    output: int  # tokens, at least 1
    priority: int = 0  # vLLM's: the lower, the sooner
    hashes: tuple[int, ...] = ()  # of the prompt's blocks, where the trace has them
    block: int = 0  # tokens in each of these blocks
