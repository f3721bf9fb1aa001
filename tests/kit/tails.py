"""Every request of a set run once, and resumed at many positions: is the tail the same?"""

import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from tests.kit.resumes import Bench, Result

BLOCK = 32  # tokens
WORDS = (
    *("river", "stone", "cloud", "lantern", "garden", "winter", "copper", "violin"),
    *("harbor", "meadow", "candle", "thunder", "table", "letter", "orchard", "bridge"),
)
NEAR = 2e-3  # log-probabilities in another batch differ by rounding


def story(draw: random.Random, words: int) -> str:
    """The beginning of a tale of so many words, which no other test has."""
    return f"A tale of {' '.join(draw.choice(WORDS) for _ in range(words))}. Once upon a time"


@dataclass
class Whole:
    """A request that has run unmoved, and the positions at which it is to be resumed."""

    request: EngineCoreRequest
    result: Result
    positions: list[int]


def run_whole(
    bench: Bench,
    cases: Mapping[str, SamplingParams],
    seed: int,
    prompts: Mapping[str, str] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Whole]:
    """Run each request to its end, and draw positions in it; `more` are other fields of some."""
    draw = random.Random(seed)
    requests = {}
    for name, params in cases.items():
        prompt = (prompts or {}).get(name) or story(draw, draw.randrange(2, 20))
        request = bench.request(prompt, params)
        requests[name] = msgspec.structs.replace(request, **(more or {}).get(name, {}))
    results = bench.run_each([(salted(request), ()) for request in requests.values()])
    return {
        name: Whole(request, result, positions(draw, request, len(result.tokens)))
        for (name, request), result in zip(requests.items(), results, strict=True)
    }


def positions(draw: random.Random, request: EngineCoreRequest, length: int) -> list[int]:
    """Two by chance, and one of those at which most can go wrong."""
    full = -len(request.prompt_token_ids or ()) % BLOCK  # where a block of the KV cache is full
    edges = [n for n in (1, full, full + 1, length - 1) if 0 < n < length]
    inner = range(1, length)
    return sorted({draw.choice(edges), *draw.sample(inner, min(2, len(inner)))})


def resume_all(bench: Bench, wholes: Mapping[str, Whole]) -> dict[str, list[tuple[int, Result]]]:
    """Resume every request at each of its positions."""
    works = [
        (name, position, salted(whole.request), whole.result.tokens[:position])
        for name, whole in wholes.items()
        for position in whole.positions
    ]
    results = bench.run_each([(request, tokens) for _, _, request, tokens in works])
    found: dict[str, list[tuple[int, Result]]] = {name: [] for name in wholes}
    for (name, position, _, _), result in zip(works, results, strict=True):
        found[name].append((position, result))
    return found


def salted(request: EngineCoreRequest) -> EngineCoreRequest:
    """The same request, to which the prefix cache has nothing to give."""
    return msgspec.structs.replace(request, cache_salt=uuid.uuid4().hex)


def different(whole: Whole, position: int, tail: Result) -> list[str]:
    """Sentences on where a request that was resumed at a position went another way."""
    told, params, said = whole.result, whole.request.sampling_params, []
    if tail.tokens != told.tokens[position:]:
        said.append(f"tokens {tail.tokens} and not {told.tokens[position:]}")
    if (tail.finish, tail.stop) != (told.finish, told.stop):
        said.append(f"the end {tail.finish, tail.stop} and not {told.finish, told.stop}")
    # The engine answers with more columns if others in the batch want more.
    width = 1 + max(params.logprobs or 0, len(params.logprob_token_ids or ()))
    if not _near(tail.logprobs, told.logprobs[position:], width):
        said.append(f"logprobs {tail.logprobs} and not {told.logprobs[position:]}")
    return [f"resumed at {position}: {line}" for line in said]


def _near(some: Sequence[Sequence[float]], others: Sequence[Sequence[float]], width: int) -> bool:
    return len(some) == len(others) and all(
        len(a) >= width
        and len(b) >= width
        and all(x == y or abs(x - y) <= NEAR for x, y in zip(a[:width], b[:width], strict=True))
        for a, b in zip(some, others, strict=True)
    )
