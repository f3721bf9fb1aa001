"""The modelled device, which fails in a step when it is told to, and at every poisonous prompt."""

import contextlib
import os
import resource
from concurrent.futures import Future
from pathlib import Path

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from llumnix.engine.sim.executor import ModelledExecutor
from tests.chaos.orders import FOLDER, POISON, done

HEADROOM = 64 << 20  # bytes that an engine may still allocate when it is to run out of memory


class FaultyExecutor(ModelledExecutor):
    """Obeys the file that is named after its process, once, and renames it when it does."""

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """Take the step, or fail as an order or the prompt demands.

        Raises:
            RuntimeError: it was ordered, or the prompt is poison.
            MemoryError: it was ordered, and the process is out of memory.
        """
        for new in scheduler_output.scheduled_new_reqs:
            if (new.prompt_token_ids or [])[: len(POISON)] == POISON:
                raise RuntimeError("this prompt is poison")
        if scheduler_output.total_num_scheduled_tokens:
            self._obey(Path(os.environ[FOLDER]) / str(os.getpid()))
        return super().execute_model(scheduler_output, non_block)

    def _obey(self, order: Path) -> None:
        try:
            what = order.read_text()
        except FileNotFoundError:
            return
        order.touch()
        order.rename(done(order))
        if what == "memory":
            _exhaust()
        raise RuntimeError("an exception in a step")


def _exhaust() -> None:
    """Allocate more than there is, of a limit that is set for it: the kernel says no, not we."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with contextlib.ExitStack() as hoard:
        while True:
            hoard.callback(bytearray(HEADROOM).clear)
