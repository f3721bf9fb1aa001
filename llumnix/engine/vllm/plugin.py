"""What vLLM's processes of an engine need besides the scheduler: loaded as a general plug-in.

Model runner V1 takes every new request to be without outputs. While it takes over a step's new
requests, those that brought some get them: penalties, min_tokens and bad words then see outputs as
outputs, and a seeded generator stands where the last token left it (see `seeds`).

The engine core gets the utilities `migration` and `compile_ahead`, a SIGTERM to it loses no
request, and it leaves word of the exception that ends it (`fault`). All are seams without a
plug-in: see `compat`. Shared memory has names that tell whose it is (`segments`).
"""

import functools
import multiprocessing
import os
from typing import Any

VARIABLE = "LLUMNIX_INSTANCE"  # set in the processes of an engine that llumnix has started


def register() -> None:
    """Called by vLLM in each of its processes; does nothing in a server that is not llumnix's."""
    if VARIABLE not in os.environ:
        return
    from llumnix.engine.vllm import compat
    from llumnix.engine.vllm.kv.migration_utility import migration
    from llumnix.engine.vllm.processes import fault, segments
    from llumnix.engine.vllm.processes.compiled_code import compile_ahead
    from llumnix.engine.vllm.processes.parent_death import end_with_parent

    if multiprocessing.parent_process() is not None:
        end_with_parent()  # workers that are spawned; those that are forked have done it
    compat.add_utility("migration", migration)
    compat.add_utility("compile_ahead", compile_ahead)
    compat.around_update_states(_taking_outputs)
    compat.lose_no_request_at_shutdown()
    compat.before_death(fault.write)
    segments.name_segments()


def _taking_outputs(module: Any, update_states: Any) -> Any:
    from llumnix.engine.vllm.seeds import before_step, ready

    def take(self: Any, scheduler_output: Any) -> Any:
        brought = {
            new.req_id: new.prefill_token_ids[new.prompt_len :]
            for new in scheduler_output.scheduled_new_reqs
            if new.prefill_token_ids and len(new.prefill_token_ids) > new.prompt_len
        }
        state_class = module.CachedRequestState

        def make(**fields: Any) -> Any:
            outputs = list(brought.get(fields["req_id"], ()))
            if fields["generator"] is not None:
                seed = fields["sampling_params"].seed
                fields["generator"] = ready(fields["generator"], seed, len(outputs), self)
            return state_class(**(fields | {"output_token_ids": outputs}))

        # The runner makes the states of new requests by this name, and nowhere else.
        module.CachedRequestState = make
        try:
            return update_states(self, scheduler_output)
        finally:
            module.CachedRequestState = state_class

    @functools.wraps(update_states)
    def update(self: Any, scheduler_output: Any) -> Any:
        if scheduler_output.scheduled_new_reqs:
            result = take(self, scheduler_output)
        else:
            result = update_states(self, scheduler_output)
        before_step(self)
        return result

    return update
