"""Grammars, schemas, regular expressions and choices of requests, before an engine sees them.

A schema of a few hundred kilobytes keeps a compiler busy for minutes, and whoever waits for it: an
engine's other structured requests, or all streams of the API server. So each is bounded in size,
and then compiled once in a process that is ended if it takes too long or too much memory.
"""

import asyncio
import hashlib
import json
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any

import orjson
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams

from llumnix.engine.vllm.compat import failed, skip_grammar_validation
from llumnix.engine.vllm.trial import Trial, TrialFailed, TrialUnavailable, Verdict

SPEC_BYTES = 256 * 1024
KEYS = 4096  # of a schema's or tag's objects
CHOICES = 4096
SMALL_BYTES = 4096  # up to which a grammar is tried apart from the large ones
WAITING = 32  # grammars that wait for a trial
KEPT = 1024  # verdicts
KEPT_BYTES = 8 * 2**20  # of what they keep
_OVERHEAD = 512  # bytes of a verdict beside that


class _Lane:
    """One process, and one thread that talks to it; those who come wait for each other."""

    def __init__(self, config: bytes, seconds: float) -> None:
        self.trial = Trial(config, seconds)
        self.thread = ThreadPoolExecutor(1, "grammars")
        self.waiting = 0

    def start(self) -> None:
        """Have the process started if there is none; nobody waits for it."""
        self.thread.submit(self.trial.start)


class Grammars:
    """Says of each grammar whether requests may have it; lives on the API server's loop."""

    def __init__(self, config: VllmConfig, seconds: float) -> None:
        """`seconds`: the longest that a grammar may take to compile."""
        packed = pickle.dumps(config)
        self._small, self._large = (_Lane(packed, seconds) for _ in range(2))
        self._known: OrderedDict[bytes, tuple[Verdict | str, int]] = OrderedDict()
        self._bytes = 0
        self._trying: dict[bytes, asyncio.Future[Verdict | str]] = {}
        self.trials = 0  # so far

    def warm(self) -> None:
        """Start the process for small grammars, so that the first one does not wait for it."""
        self._small.start()

    async def admit(self, params: SamplingParams) -> None:
        """Return if the grammar of these parameters can be used; they are validated then.

        Raises vLLM's validation error if it can't, or its error of 503 if that can't be told now.
        """
        asked = params.structured_outputs
        if asked is None or asked.all_constraints_none() or asked.json_object:
            return  # nothing in it is the client's
        spec = _spec(asked)
        if (problem := _problem(asked, spec)) is not None:
            raise failed(problem, HTTPStatus.BAD_REQUEST)
        verdict = await self._verdict(hashlib.sha256(spec).digest(), asked, len(spec))
        if isinstance(verdict, str):
            raise failed(verdict, HTTPStatus.BAD_REQUEST)
        for name, value in verdict.changed.items():
            setattr(asked, name, value)
        skip_grammar_validation(params)

    async def _verdict(
        self, key: bytes, asked: StructuredOutputsParams, size: int
    ) -> Verdict | str:
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known[0]
        trying = self._trying.get(key)
        if trying is None:
            lane = self._small if size <= SMALL_BYTES else self._large
            if lane.waiting >= WAITING:
                raise failed(
                    "too many grammars wait to be compiled; try again soon",
                    HTTPStatus.SERVICE_UNAVAILABLE,
                )
            lane.waiting += 1
            trying = asyncio.ensure_future(self._try(key, lane, asked))
            self._trying[key] = trying
        try:
            return await asyncio.shield(trying)  # others may wait for the same
        except TrialUnavailable as error:
            raise failed(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error

    async def _try(self, key: bytes, lane: _Lane, asked: StructuredOutputsParams) -> Verdict | str:
        self.trials += 1
        loop = asyncio.get_running_loop()
        verdict: Verdict | str
        try:
            verdict = await loop.run_in_executor(lane.thread, partial(lane.trial.run, asked))
        except TrialFailed as error:
            verdict = str(error)
            lane.start()  # another in its place, if it has died of it
        finally:
            lane.waiting -= 1
            del self._trying[key]
        self._keep(key, verdict)
        return verdict

    def _keep(self, key: bytes, verdict: Verdict | str) -> None:
        texts = [verdict] if isinstance(verdict, str) else verdict.changed.values()
        size = _OVERHEAD + sum(len(text) for text in texts if isinstance(text, str))
        self._known[key] = verdict, size
        self._bytes += size
        while len(self._known) > KEPT or self._bytes > KEPT_BYTES:
            _, (_, freed) = self._known.popitem(last=False)
            self._bytes -= freed

    async def close(self) -> None:
        """End the processes; what is being tried is refused."""
        lanes = (self._small, self._large)
        for lane in lanes:
            lane.thread.shutdown(wait=False, cancel_futures=True)
            lane.trial.kill()
        await asyncio.gather(*(asyncio.to_thread(lane.thread.shutdown) for lane in lanes))
        for lane in lanes:
            lane.trial.close()


def _spec(asked: StructuredOutputsParams) -> bytes:
    """All that a grammar is made of, as bytes."""
    fields: dict[str, Any] = vars(asked)
    try:
        return orjson.dumps(fields, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # half a surrogate, or a large number
        return json.dumps(fields, default=str).encode()


def _problem(asked: StructuredOutputsParams, spec: bytes) -> str | None:
    """Why a grammar is not even tried."""
    if len(spec) > SPEC_BYTES:
        return f"a grammar or schema must have at most {SPEC_BYTES} bytes, not {len(spec)}"
    if asked.choice is not None and len(asked.choice) > CHOICES:
        return f"choice must have at most {CHOICES} items, not {len(asked.choice)}"
    keys = spec.count(b'":') + spec.count(b'\\":')
    if (asked.json is not None or asked.structural_tag is not None) and keys > KEYS:
        return f"a schema must have at most {KEYS} keys, not {keys}"
    return None
