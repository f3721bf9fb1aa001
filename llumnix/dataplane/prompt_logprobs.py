"""Logprobs of long prompts, of which the frontend takes a slice in each turn of the event loop.

They come in one output, behind the prefill, and vLLM makes a Python object of each: a second for
80,000 of them, in which no other stream would get a token.
"""

import asyncio
from collections.abc import Callable

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsTensors

from llumnix.late import Late
from llumnix.tasks import TaskSet

AT_ONCE = 1024  # logprobs in one turn of the loop

# Gives the frontend a slice for a request; False if it has no such request any more.
TakeIn = Callable[[str, LogprobsTensors], bool]
# Hands outputs of one engine, by its index, and of one step, by its time, on to the frontend.
PassOn = Callable[[list[EngineCoreOutput], int, float], None]


class PromptLogprobs:
    """The outputs that wait until the logprobs before them have been taken in."""

    def __init__(self, tasks: TaskSet, pass_on: PassOn) -> None:
        self._tasks = tasks
        self._pass_on = pass_on
        # By request: its outputs, with the engine and the time of each.
        self._waiting: dict[str, list[tuple[EngineCoreOutput, int, float]]] = {}
        self.take_in: Late[TakeIn] = Late("frontend")

    def hold(self, output: EngineCoreOutput, engine: int, timestamp: float) -> bool:
        """Whether this output has to wait; it is passed on later then, in the request's order."""
        waiting = self._waiting.get(output.request_id)
        if waiting is not None:
            waiting.append((output, engine, timestamp))
            return True
        tensors = output.new_prompt_logprobs_tensors
        if tensors is None or tensors.logprobs.numel() <= AT_ONCE:
            return False
        self._waiting[output.request_id] = [(output, engine, timestamp)]
        self._tasks.spawn(self._take_all_in(output.request_id))
        return True

    async def _take_all_in(self, request_id: str) -> None:
        waiting = self._waiting[request_id]
        try:
            for output, engine, timestamp in waiting:  # to which more may be added meanwhile
                if output.new_prompt_logprobs_tensors is not None:
                    await self._slice_by_slice(request_id, output.new_prompt_logprobs_tensors)
                    output.new_prompt_logprobs_tensors = None
                self._pass_on([output], engine, timestamp)
        finally:
            del self._waiting[request_id]

    async def _slice_by_slice(self, request_id: str, tensors: LogprobsTensors) -> None:
        tokens, each = tensors.logprobs.shape
        step = max(AT_ONCE // each, 1)
        take_in = self.take_in()
        for begin in range(0, tokens, step):
            part = slice(begin, begin + step)
            one = LogprobsTensors(
                tensors.logprob_token_ids[part],
                tensors.logprobs[part],
                tensors.selected_token_ranks[part],
            )
            if not take_in(request_id, one):
                return  # its client has left
            await asyncio.sleep(0)
