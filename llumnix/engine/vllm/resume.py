"""Resume on stock vLLM: a request that enters with outputs already in place.

To vLLM's scheduler such a request looks like one that comes back after a preemption: it computes
whatever of the request's tokens is not computed yet, and counts outputs from where they were. The
tokens travel in the request's `extra_args`, which vLLM carries untouched.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from llumnix.engine.vllm.grammars.pending import changed

_KEY = "llumnix_generated"
# What was asked of the prompt was delivered with the first output. (The last two are new in 0.32.)
_OF_THE_PROMPT = ("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start")


def with_generated(request: EngineCoreRequest, generated: Sequence[int]) -> EngineCoreRequest:
    """A copy of the request that brings its outputs along; the request itself without any.

    Raises ValueError for one that would kill an engine, which takes these things unseen: outputs
    that a client gives it, or a seed that is too large, as a choice of a request with a large one.
    """
    if request.sampling_params is not None:
        _check(request.sampling_params)
    if not generated:
        return request
    assert request.sampling_params is not None
    params = copy(request.sampling_params)
    params.extra_args = {**(params.extra_args or {}), _KEY: list(generated)}
    for name in _OF_THE_PROMPT:
        if getattr(params, name, None) is not None:
            setattr(params, name, None)
            params.skip_reading_prefix_cache = False  # which only that had asked for
    resumed: EngineCoreRequest = msgspec.structs.replace(request, sampling_params=params)
    return resumed


def _check(params: SamplingParams) -> None:
    if params.extra_args and _KEY in params.extra_args:
        raise ValueError(f"extra_args may not have {_KEY!r}, by which a request is resumed")
    if params.seed is not None and not -(2**63) <= params.seed < 2**63:
        raise ValueError("a seed, and that of each further choice, must be a number of 64 bits")


def put_in_place(request: Request, manager: StructuredOutputManager) -> None:
    """In the engine: give a new request the outputs that it brought, before it is queued."""
    extra = request.sampling_params.extra_args if request.sampling_params else None
    tokens = extra.pop(_KEY, None) if extra else None
    if not tokens:
        return
    structured = request.structured_output_request
    if structured is not None:
        start = _grammar_start(request, manager, tokens)
        if start is not None:
            structured.reasoning_ended = True
            structured.grammar = _after(structured._grammar, request.request_id, tokens[start:])
    request.append_output_token_ids(tokens)
    request.take_prefill_stats()  # its prefill was counted where it first ran


def _grammar_start(
    request: Request, manager: StructuredOutputManager, tokens: list[int]
) -> int | None:
    """The first output that the grammar has seen; None while the model is still reasoning."""
    structured = request.structured_output_request
    reasoner = manager._get_reasoner(request)
    if reasoner is None or manager.enable_in_reasoning or structured.reasoning_ended:
        return 0
    seen = list(request.prompt_token_ids or ())
    if structured.reasoning_ended is None and reasoner.is_reasoning_end(seen):
        return 0
    if getattr(reasoner, "reasoning_end_token_ids", None):  # a parser engine's, from 0.32 on
        end = reasoner.find_reasoning_end(tokens)
        if end.offset >= len(tokens):
            return None
        # What ends it without saying so, as the begin of a tool call does, is the grammar's.
        return int(end.offset if end.implicit else end.offset + 1)
    for position, token in enumerate(tokens):
        seen.append(token)
        if reasoner.is_reasoning_end_streaming(seen, [token]):
            return position + 1
    return None


def _after(grammar: Any, request_id: str, tokens: list[int]) -> Any:
    """The grammar as it stands after the tokens; it may still be compiling."""

    def accept(compiled: StructuredOutputGrammar) -> StructuredOutputGrammar:
        if tokens:
            compiled.accept_tokens(request_id, tokens)
        return compiled

    return changed(grammar, accept)
