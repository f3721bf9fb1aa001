"""A modelled LLM engine: vLLM's scheduling rules, without a model and without a clock.

What is modelled, after `v1/core/sched/scheduler.py` of vLLM 0.32: continuous batching (running
requests first, then the queue), chunked prefill under a token budget, KV blocks taken as tokens are
computed, admission only if all of a request's tokens fit (`scheduler_reserve_full_isl`), preemption
by recompute, FCFS and priority order, the order of the checks that end a request, and, if asked
for, that of asynchronous scheduling (`step_with_batch_queue` of `v1/engine/core.py`) which decides
a step while the one before it is computed.

What is not: prefix caching (a moved request says with `cached` what came along), the reserved null
block, the watermark, speculative decoding, encoders, LoRA, and stop strings, which are the
frontend's. There is no I/O and no waiting: a step returns the seconds it would have taken, so the
same engine runs in real time (the caller sleeps) and in virtual time (the caller's clock advances).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from llumnix.engine.sim.batch import Batch, Sequence
from llumnix.engine.sim.config import ModelConfig
from llumnix.engine.sim.request import (
    FinishReason,
    Output,
    SimRequest,
    StepResult,
    stream_seed,
    token_at,
)


@dataclass(slots=True, eq=False)
class ModelledEngine:
    """Requests in, tokens out, one `step` at a time; see the module for what is modelled."""

    config: ModelConfig
    _batch: Batch = field(init=False)
    _known: dict[str, Sequence] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._batch = Batch(self.config)

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._batch.running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._batch.queue)

    @property
    def preempted(self) -> int:
        """Requests in the queue that have run before."""
        return sum(sequence.preempted for sequence in self._batch.queue)

    @property
    def preemptions(self) -> int:
        """How often a request was preempted since the engine was made."""
        return self._batch.preemptions

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody holds."""
        return self._batch.free

    @property
    def used_blocks(self) -> int:
        """KV blocks that are held: by running requests, and for those that are to come."""
        return self.config.total_blocks - self._batch.free

    @property
    def held_blocks(self) -> int:
        """KV blocks that are held for requests that are to come."""
        return self._batch.held

    @property
    def waiting_blocks(self) -> int:
        """KV blocks that the whole queue asks for."""
        return self._batch.queue.blocks

    @property
    def head_blocks(self) -> int:
        """KV blocks that the head of the queue asks for; 0 for an empty queue."""
        head = self._batch.queue.head
        return head.demand if head else 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._known)

    def held(self) -> dict[str, int]:
        """The running requests in the order they were admitted, and the blocks each holds."""
        return {sequence.request.id: sequence.blocks for sequence in self._batch.running}

    def queued(self) -> list[str]:
        """The waiting requests in the order in which they are to be admitted."""
        return [sequence.request.id for sequence in self._batch.queue]

    def computed(self, request_id: str) -> int | None:
        """The tokens of a request whose KV is in place; None if it is not here."""
        sequence = self._known.get(request_id)
        return sequence.computed if sequence else None

    def tokens(self, request_id: str) -> int | None:
        """The tokens of a request, prompt and outputs; None if it is not here."""
        sequence = self._known.get(request_id)
        return sequence.tokens if sequence else None

    def prompt(self, request_id: str) -> Tokens[int]:
        """The prompt of a request that is here."""
        return self._known[request_id].request.prompt

    def hold(self, blocks: int) -> None:
        """Keep so many free blocks from being used, or give them back with a negative number.

        Raises:
            ValueError: there are fewer.
        """
        batch = self._batch
        if blocks > 0 and blocks > batch.free - len(batch.running):
            raise ValueError(f"{blocks} KV blocks are needed and {batch.free} are free")
        batch.free -= blocks
        batch.held += blocks

    def add(self, request: SimRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: the id is in use, the prompt is empty, or it has no room for an output.
        """
        tokens = len(request.prompt) + request.generated
        if request.id in self._known:
            raise ValueError(f"request {request.id} is here already")
        if not request.prompt or request.generated >= request.max_tokens:
            raise ValueError(f"request {request.id} has no prompt or nothing left to generate")
        if tokens >= self.config.max_model_len:
            raise ValueError(
                f"request {request.id} has {tokens} tokens and so no room for another "
                f"in {self.config.max_model_len}"
            )
        sequence = Sequence(
            request=request,
            seed=0 if self.config.silent else stream_seed(request.prompt),
            order=self._batch.queue.place(request, request.front),
            tokens=tokens,
            demand=0,
            cached=request.cached,
        )
        self._known[request.id] = sequence
        self._batch.add(sequence)

    def abort(self, ids: Iterable[str]) -> list[str]:
        """Drop requests wherever they are; return those that were here."""
        removed = []
        for request_id in ids:
            sequence = self._known.pop(request_id, None)
            if sequence is None:
                continue
            removed.append(request_id)
            if sequence.demand:
                self._batch.queue.remove(sequence)
            else:
                self._batch.running.remove(sequence)
                self._batch.release(sequence)
        return removed

    def step(self) -> StepResult:
        """Schedule, compute and sample once; does nothing when there is no work."""
        work = self._batch.schedule()
        seconds = work.seconds(self.config.profile)
        computed = work.prefill + work.batch
        return StepResult(seconds, self._compute(), work.preempted, computed)

    def check(self) -> None:
        """Verify the books. Raises AssertionError, with a message that says where they fail."""
        self._batch.check()
        everyone = [s.request.id for s in (*self._batch.running, *self._batch.queue)]
        assert sorted(everyone) == sorted(self._known), "a request is lost or in two places"

    def _compute(self) -> list[Output]:
        outputs = []
        ended = False
        batch = self._batch
        for sequence in batch.running:
            if not sequence.scheduled:
                continue
            sequence.computed += sequence.scheduled
            sequence.scheduled = 0
            if sequence.computed == sequence.tokens:
                token, finish = self._sample(sequence)
                outputs.append(Output(sequence.request.id, (token,), finish))
                if finish:
                    ended = True
                    del self._known[sequence.request.id]
                    batch.release(sequence)
        if ended:
            batch.running = [s for s in batch.running if s.blocks]
        return outputs

    def _sample(self, sequence: Sequence) -> tuple[int, FinishReason | None]:
        request, config = sequence.request, self.config
        position = sequence.tokens - len(request.prompt)
        sequence.tokens += 1
        if position + 1 == request.ends_at:
            return config.eos, FinishReason.STOP
        token = 0
        if not config.silent:
            token = token_at(sequence.seed, position, config.vocab_size, (config.eos,))
        if token in request.stop_token_ids:
            return token, FinishReason.STOP
        if position + 1 >= request.max_tokens or sequence.tokens >= config.max_model_len:
            return token, FinishReason.LENGTH
        return token, None
