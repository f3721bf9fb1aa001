"""Grammars, schemas, regular expressions and choices of requests, before an engine sees them.

A schema of a few hundred kilobytes keeps a compiler busy for minutes, and whoever waits for it: an
engine's other structured requests, or all streams of the API server. So each is bounded in size,
and then compiled once in a process that is ended if it takes too long or too much memory.
"""

import asyncio
import hashlib
import json
import pickle
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import orjson
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams

from llumnix.engine.vllm.compat import failed, skip_grammar_validation
from llumnix.engine.vllm.grammars.trial import Trial, TrialFailed, TrialUnavailable, Verdict

SPEC_BYTES = 256 * 1024
KEYS = 4096  # of a schema's or tag's objects
CHOICES = 4096
SMALL_BYTES = 4096  # up to which a grammar is tried apart from the large ones
WAITING = 32  # grammars that wait for a trial
SHARE = WAITING // 2  # of them, of one caller
KEPT = 1024  # verdicts
KEPT_BYTES = 8 * 2**20  # of what they keep
_OVERHEAD = 512  # bytes of a verdict beside that

# Who asks in this task, by a name or an address; "" for nobody in particular.
asker: ContextVar[str] = ContextVar("asker", default="")


class _Lane:
    """One process, and one thread that talks to it; those who come wait for each other."""

    def __init__(self, config: bytes, seconds: float) -> None:
        self.trial = Trial(config, seconds)
        self.thread = ThreadPoolExecutor(1, "grammars")
        self._waiting: Counter[str] = Counter()  # grammars, by who has asked first

    @property
    def waiting(self) -> int:
        """Grammars that wait, and the one that is being tried."""
        return self._waiting.total()

    def enter(self, who: str) -> None:
        """Take one of the places. Raises vLLM's error of 503 if all are taken, or their share."""
        if self.waiting >= WAITING:
            whose = "too many grammars wait"
        elif who and self._waiting[who] >= SHARE:
            whose = "too many grammars of yours wait"
        else:
            self._waiting[who] += 1
            return
        text = f"{whose} to be compiled; try again soon"
        raise failed(text, HTTPStatus.SERVICE_UNAVAILABLE)

    def leave(self, who: str) -> None:
        """Give a place back."""
        self._waiting[who] -= 1
        if not self._waiting[who]:
            del self._waiting[who]

    def start(self) -> None:
        """Have the process started if there is none; nobody waits for it."""
        self.thread.submit(self.trial.start)


class _Attempt:
    """A grammar on its way through a lane, and how many wait for it."""

    def __init__(self, lane: _Lane, asked: StructuredOutputsParams) -> None:
        self.who = asker.get()
        lane.enter(self.who)
        self.lane = lane
        self.running: Future[Verdict] = lane.thread.submit(lane.trial.run, asked)
        self.verdict: asyncio.Future[Verdict | str]
        self.wanted = 0  # by so many; if nobody is left before it begins, it never does


class Grammars:
    """Says of each grammar whether requests may have it; lives on the API server's loop."""

    def __init__(self, config: VllmConfig, seconds: float) -> None:
        """`seconds`: the longest that a grammar may take to compile."""
        packed = pickle.dumps(config)
        self._small, self._large = (_Lane(packed, seconds) for _ in range(2))
        self._known: OrderedDict[bytes, tuple[Verdict | str, int]] = OrderedDict()
        self._bytes = 0
        self._trying: dict[bytes, _Attempt] = {}
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
        attempt = self._trying.get(key)
        if attempt is None:
            lane = self._small if size <= SMALL_BYTES else self._large
            attempt = self._trying[key] = _Attempt(lane, asked)
            attempt.verdict = asyncio.ensure_future(self._try(key, attempt))
        attempt.wanted += 1
        try:
            return await asyncio.shield(attempt.verdict)  # others may wait for the same
        except TrialUnavailable as error:
            raise failed(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error
        finally:
            attempt.wanted -= 1
            if not attempt.wanted and attempt.running.cancel():  # it has not begun
                self._end(key, attempt)

    async def _try(self, key: bytes, attempt: _Attempt) -> Verdict | str:
        verdict: Verdict | str
        try:
            verdict = await asyncio.wrap_future(attempt.running)
        except TrialFailed as error:
            verdict = str(error)
            attempt.lane.start()  # another in its place, if it has died of it
        finally:
            self._end(key, attempt)
        self.trials += 1
        self._keep(key, verdict)
        return verdict

    def _end(self, key: bytes, attempt: _Attempt) -> None:
        if self._trying.get(key) is attempt:
            del self._trying[key]
            attempt.lane.leave(attempt.who)

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
