"""A vLLM engine without a node: a request can be resumed in it at any position, at will."""

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from llumnix.engine.base import Death, EngineEvents
from llumnix.engine.vllm import scheduler
from llumnix.engine.vllm.instance import VllmEngine
from llumnix.engine.vllm.kv.kv_blocks import Rendezvous
from llumnix.engine.vllm.processes.placement import place
from llumnix.engine.vllm.processes.watchdog import Patience

T = TypeVar("T")

LONGEST = 300.0  # seconds that anything may take


@dataclass
class Result:
    """What an engine has answered to one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)  # for each token
    of_prompt: int = 0  # how many times logprobs of the prompt came
    prefills: int = 0  # how many times the prompt was accounted for
    finish: str = ""
    stop: int | str | None = None
    steps: int = 0  # outputs, each of which has a token or, with speculative decoding, some
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, output: EngineCoreOutput) -> None:
        self.steps += bool(output.new_token_ids)
        self.tokens += output.new_token_ids
        if output.new_logprobs is not None:
            self.logprobs += [list(map(float, row)) for row in output.new_logprobs.logprobs]
        self.of_prompt += output.new_prompt_logprobs_tensors is not None
        self.prefills += output.prefill_stats is not None
        if output.finish_reason is not None:
            self.finish, self.stop = str(output.finish_reason), output.stop_reason
            self.done.set()


class Bench:
    """One engine, on a loop in a thread of its own; the methods are called from others."""

    def __init__(self, model: str, folder: Path, **options: Any) -> None:
        arguments = AsyncEngineArgs(
            model=model, dtype="float32", enforce_eager=True, **({"max_model_len": 2048} | options)
        )
        self.config = arguments.create_engine_config()
        assert scheduler.install(self.config)
        self.inputs = InputProcessor(self.config)
        self._folder = folder
        self._results: dict[str, Result] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.died: list[str] = []

    def start(self) -> "Bench":
        self._thread.start()
        self.do(self._start())
        return self

    async def _start(self) -> None:
        nowhere = Rendezvous("", {}, "127.0.0.1")
        log = self._folder / "engine.log"
        placement = place(self.config, 0, 2)
        self.engine = VllmEngine("bench", self.config, placement, log, Patience(LONGEST), nowhere)
        await self.engine.start(EngineEvents(self._on_outputs, self._on_death))

    def close(self) -> None:
        self.do(self.engine.stop(10.0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(LONGEST)

    # ---- requests ----

    def request(
        self, prompt: str | Sequence[int], params: SamplingParams, **more: Any
    ) -> EngineCoreRequest:
        """What vLLM's frontend makes of a prompt and its parameters."""
        tokens = self.inputs.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        return self.inputs.process_inputs(
            "?", {"prompt_token_ids": tokens}, params, ("generate",), **more
        )

    def run(self, request: EngineCoreRequest, generated: Sequence[int] = ()) -> Result:
        """Have the engine do it, or do the rest of it, to its end."""
        return self.run_all(request, [generated])[0]

    def run_all(
        self, request: EngineCoreRequest, beginnings: Sequence[Sequence[int]]
    ) -> list[Result]:
        """The same with several beginnings, all at once."""
        return self.run_each([(request, generated) for generated in beginnings])

    def run_each(self, works: Sequence[tuple[EngineCoreRequest, Sequence[int]]]) -> list[Result]:
        """Different requests, each with its beginning, all at once."""
        return self.do(self._run_each(works))

    async def _run_each(
        self, works: Sequence[tuple[EngineCoreRequest, Sequence[int]]]
    ) -> list[Result]:
        results = [await self._add(request, generated) for request, generated in works]
        async with asyncio.timeout(LONGEST):
            for result in results:
                await result.done.wait()
        return results

    async def _add(self, request: EngineCoreRequest, generated: Sequence[int]) -> Result:
        name = uuid.uuid4().hex
        result = self._results[name] = Result()
        await self.engine.add(msgspec.structs.replace(request, request_id=name), generated)
        return result

    def _on_outputs(self, step: EngineCoreOutputs) -> None:
        for output in step.outputs:
            self._results[output.request_id].take(output)

    def _on_death(self, death: Death) -> None:
        reason = death.reason
        self.died.append(reason)
        for result in self._results.values():
            if not result.done.is_set():
                result.finish = reason
                result.done.set()
