"""vLLM's schedulers, which let a request enter with outputs in place, and its KV blocks move."""

from collections import deque
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from llumnix.engine.vllm.grammars.time_limit import bound
from llumnix.engine.vllm.kv.block_holds import BlockHolds
from llumnix.engine.vllm.resume import put_in_place

STEPS = 8  # under way at a time, at most


class _Moving:
    """What both schedulers get; see `resume`, `block_holds` and `fault`."""

    requests: dict[str, Request]
    block_holds: BlockHolds

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block_holds = BlockHolds(self)
        self._adopted: set[str] = set()  # of those that wait, who holds blocks already
        self._steps: deque[SchedulerOutput] = deque(maxlen=STEPS)  # under way
        self._adding: str | None = None  # the request that is being added
        self._choosing = False  # a step is being scheduled

    def add_request(self, request: Request) -> None:
        """Queue a request; one that brought outputs is resumed, before those that are new."""
        self._adding = request.request_id
        bound(request)
        put_in_place(request, self.structured_output_manager)  # type: ignore[attr-defined]
        if request.num_output_tokens and self.block_holds.adopt(request):
            self._adopted.add(request.request_id)
        super().add_request(request)  # type: ignore[misc]
        if request.num_output_tokens and request in self.waiting:  # type: ignore[attr-defined]
            self.waiting.remove_request(request)  # type: ignore[attr-defined]
            self.waiting.prepend_request(request)  # type: ignore[attr-defined]
        self._adding = None

    def at_hand(self) -> set[str]:
        """The requests to which an exception at this moment may be owed.

        That is the one which is being added, or those of the steps under way. While a step is being
        scheduled it may be any, so none is named.
        """
        if self._adding is not None:
            return {self._adding}
        if self._choosing:
            return set()
        return {request_id for step in self._steps for request_id in step.num_scheduled_tokens}

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step; the workers learn of the outputs that a new request brought.

        Model runner V2 is told by vLLM itself; V1 is not, and takes them in `plugin`.
        """
        self._choosing = True
        if self._adopted and not self.running:  # type: ignore[attr-defined]
            self._unblock()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for new in output.scheduled_new_reqs:
            self._adopted.discard(new.req_id)
            request = self.requests[new.req_id]
            if new.prefill_token_ids is None and request.num_output_tokens:
                new.prefill_token_ids = list(request._all_token_ids)
        self._choosing = False
        self._steps.append(output)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any) -> Any:
        """Take what the workers have made of a step, which is not under way any more."""
        outputs = super().update_from_output(scheduler_output, *args)  # type: ignore[misc]
        while self._steps and self._steps.popleft() is not scheduler_output:
            pass
        return outputs

    def _unblock(self) -> None:
        """Nobody runs who could be preempted for the first: those behind may hold the memory.

        vLLM has blocks of waiting requests with KV connectors only, and looks at those first from
        0.32 on (`kv_holding_waiting`); before that it would wait for ever.
        """
        waiting = list(self.waiting)  # type: ignore[attr-defined]
        self._adopted.intersection_update(self.requests)
        for request in waiting[1:]:
            if request.request_id in self._adopted:
                self._adopted.discard(request.request_id)
                self.block_holds.disown(request)


class MovingScheduler(_Moving, Scheduler):
    """vLLM's scheduler, for requests that move."""


class MovingAsyncScheduler(_Moving, AsyncScheduler):
    """vLLM's scheduler for asynchronous scheduling, for requests that move."""


def install(config: VllmConfig) -> bool:
    """Have engines of this configuration move requests; False if the operator chose otherwise.

    That is a scheduler or a worker extension of the operator's own, for which vLLM has one place.
    """
    scheduler, parallel = config.scheduler_config, config.parallel_config
    if scheduler.scheduler_cls is not None or parallel.worker_extension_cls:
        return False
    name = "MovingAsyncScheduler" if scheduler.async_scheduling else "MovingScheduler"
    scheduler.scheduler_cls = f"{__name__}.{name}"
    parallel.worker_extension_cls = "llumnix.engine.vllm.kv.transfer.TransferExtension"
    return True


def installed(config: VllmConfig) -> bool:
    """Whether engines of this configuration move requests."""
    return str(config.scheduler_config.scheduler_cls).startswith(f"{__name__}.")
