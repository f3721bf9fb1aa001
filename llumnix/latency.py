"""How long a step of an engine takes: what a modelled engine obeys, and a policy reckons with.

The forms are those of the paper's simulator as fitted in its evaluation (Llumnix, OSDI'24, Fig. 10
and Fig. 4): prefill of n tokens a + b n + c n^2, a decode step of B requests with T tokens of
context in all d + e B + f T.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """Coefficients of the two forms, in seconds.

    Raises:
        ValueError: one of them is negative, or not finite.
    """

    prefill_fixed: float = 0.0  # a, a step
    prefill_token: float = 0.0  # b, a token
    prefill_square: float = 0.0  # c, a token squared: attention
    decode_fixed: float = 0.0  # d, a step
    decode_request: float = 0.0  # e, a request in the batch
    decode_context: float = 0.0  # f, a token of context: reading the KV cache
    # A request, beside the steps: from the client into the engine, and its first token back. No
    # step waits for it. None of the paper's; the simulator adds it to the time of every token.
    outside: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            if not 0 <= getattr(self, one.name) < inf:
                raise ValueError(f"{one.name} must be 0 seconds or more, and finite")

    def step_seconds(
        self,
        prefill_tokens: int,
        decode_batch: int,
        context_tokens: int,
        prefill_squares: int | None = None,
    ) -> float:
        """Seconds of one step; 0 for a step that computes nothing.

        A mixed step (chunked prefill) runs both parts in one pass over the weights, so it pays the
        larger of the two fixed parts once. That is our reading: the fits are of pure steps.

        `prefill_squares` is what c multiplies. It defaults to the square of `prefill_tokens`, one
        prompt prefilled at once; a chunk of n tokens behind p earlier ones is (p + n)^2 - p^2.
        """
        seconds = fixed = 0.0
        if prefill_tokens:
            squares = prefill_tokens**2 if prefill_squares is None else prefill_squares
            fixed = self.prefill_fixed
            seconds = self.prefill_token * prefill_tokens + self.prefill_square * squares
        if decode_batch:
            fixed = max(fixed, self.decode_fixed)
            seconds += self.decode_request * decode_batch + self.decode_context * context_tokens
        return fixed + seconds


PROFILES: Mapping[str, LatencyProfile] = MappingProxyType(
    {
        # No time at all: as many steps as the caller can make.
        "instant": LatencyProfile(),
        # A few milliseconds a step, for tests in real time.
        "cpu-smoke": LatencyProfile(2e-3, 1e-5, 0.0, 3e-3, 5e-5, 0.0),
        # Slow enough for two cores to carry half a dozen engine processes, and their faults.
        "cpu-steady": LatencyProfile(5e-3, 1e-5, 0.0, 20e-3, 1e-4, 0.0),
        # LLaMA-7B, fp16, vLLM 0.2.0: fitted to Fig. 10 of the paper (prefill within 3 %). The split
        # of the decode time into d and f rests on Fig. 4 and is uncertain; their sum at 8,192
        # tokens of context, 42.6 ms, is not.
        "llama-7b-a10": LatencyProfile(5.6e-3, 0.2028e-3, 5.09e-9, 30.4e-3, 0.286e-3, 1.49e-6),
        # LLaMA-7B shape, bf16, vLLM 0.26 with CUDA graphs and asynchronous scheduling, on one H100:
        # benchmarks/validation.py, 15 decode steps (B 1 to 192, up to 70,627 tokens of context,
        # within 2.3 %) and 30 steps with a prefill of 16 to 2,000 tokens (mean error 9.7 %). The
        # profile's simulation was held against that engine: docs/simulator.md.
        "llama-7b-h100": LatencyProfile(
            6.925e-3, 11.01e-6, 4.052e-9, 6.088e-3, 14.65e-6, 0.1603e-6, outside=7.903e-3
        ),
    }
)
