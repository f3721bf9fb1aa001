"""The logprobs of a long prompt reach the frontend whole, in order, and a little at a time."""

import asyncio

import torch
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import LogprobsTensors

from llumnix.dataplane.prompt_logprobs import AT_ONCE, PromptLogprobs
from llumnix.tasks import TaskSet
from tests.kit.loop import on_loop


def tensors(tokens: int, each: int) -> LogprobsTensors:
    ids = torch.arange(tokens * each).reshape(tokens, each)
    return LogprobsTensors(ids, ids.float(), torch.arange(tokens))


def output(request_id: str, tokens: list[int], tensors: LogprobsTensors | None) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, tokens, new_prompt_logprobs_tensors=tensors)


class Frontend:
    """Keeps what it is given, and in which turn of the loop."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, LogprobsTensors]] = []
        self.passed: list[EngineCoreOutput] = []
        self.turn = 0
        self.left = False
        self.tasks = TaskSet()
        self.logprobs = PromptLogprobs(self.tasks, self._pass_on)
        self.logprobs.take_in.bind(self._take_in)

    def _take_in(self, request_id: str, part: LogprobsTensors) -> bool:
        self.parts.append((self.turn, part))
        return not self.left

    def hold(self, output: EngineCoreOutput) -> bool:
        return self.logprobs.hold(output, engine=3, timestamp=7.0)

    def _pass_on(self, outputs: list[EngineCoreOutput], engine: int, timestamp: float) -> None:
        assert (engine, timestamp) == (3, 7.0)
        self.passed += outputs

    async def until_idle(self) -> None:
        while len(self.tasks):
            await asyncio.sleep(0)
            self.turn += 1


@on_loop
async def test_few_are_passed_on_as_they_are() -> None:
    frontend = Frontend()
    assert not frontend.hold(output("r", [1], None))
    assert not frontend.hold(output("r", [1], tensors(AT_ONCE // 2, 2)))
    assert not len(frontend.tasks)


@on_loop
async def test_many_are_taken_in_before_the_outputs_of_their_request_go_on() -> None:
    frontend = Frontend()
    whole = tensors(1000, 21)
    first, second, third = output("r", [], whole), output("r", [1], None), output("r", [2], None)
    assert frontend.hold(first) and frontend.hold(second)
    assert not frontend.hold(output("other", [1], None)), "nobody else waits for them"
    await asyncio.sleep(0)
    frontend.turn += 1
    assert frontend.hold(third)
    await frontend.until_idle()
    assert frontend.passed == [first, second, third]
    assert first.new_prompt_logprobs_tensors is None, "they are not taken in twice"
    turns = [turn for turn, _ in frontend.parts]
    assert len(set(turns)) == len(turns) > 20
    assert all(part.logprobs.numel() <= AT_ONCE for _, part in frontend.parts)
    for name in "logprob_token_ids", "logprobs", "selected_token_ranks":
        parts = [getattr(part, name) for _, part in frontend.parts]
        assert torch.equal(torch.cat(parts), getattr(whole, name))
    assert not frontend.hold(output("r", [3], None)), "the request is as any other now"


@on_loop
async def test_a_client_that_has_left_is_not_worked_for() -> None:
    frontend = Frontend()
    frontend.left = True
    assert frontend.hold(output("r", [1], tensors(1000, 21)))
    await frontend.until_idle()
    assert len(frontend.parts) == 1
