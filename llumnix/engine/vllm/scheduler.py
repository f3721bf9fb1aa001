"""vLLM's schedulers, which let a request enter with outputs in place, and its KV blocks move."""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from llumnix.engine.vllm.depot import BlockDepot
from llumnix.engine.vllm.resume import put_in_place


class _Moving:
    """What both schedulers get; see `resume` and `depot`."""

    requests: dict[str, Request]
    depot: BlockDepot

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depot = BlockDepot(self)

    def add_request(self, request: Request) -> None:
        """Queue a request; one that brought outputs is resumed, before those that are new."""
        put_in_place(request, self.structured_output_manager)  # type: ignore[attr-defined]
        if request.num_output_tokens:
            self.depot.adopt(request)
        super().add_request(request)  # type: ignore[misc]
        if request.num_output_tokens and request in self.waiting:  # type: ignore[attr-defined]
            self.waiting.remove_request(request)  # type: ignore[attr-defined]
            self.waiting.prepend_request(request)  # type: ignore[attr-defined]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step; the workers learn of the outputs that a new request brought.

        Model runner V2 is told by vLLM itself; V1 is not, and takes them in `plugin`.
        """
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if new.prefill_token_ids is None and request.num_output_tokens:
                new.prefill_token_ids = list(request._all_token_ids)
        return output


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
    parallel.worker_extension_cls = "llumnix.engine.vllm.transfer.TransferExtension"
    return True


def installed(config: VllmConfig) -> bool:
    """Whether engines of this configuration move requests."""
    return str(config.scheduler_config.scheduler_cls).startswith(f"{__name__}.")
