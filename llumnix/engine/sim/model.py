"""A modelled LLM engine: vLLM's scheduling rules, without a model and without a clock.

What is modelled, after `v1/core/sched/scheduler.py` of vLLM 0.32: continuous batching (running
requests first, then the queue), chunked prefill under a token budget, KV blocks taken as tokens are
computed, admission only if all of a request's tokens fit (`scheduler_reserve_full_isl`), preemption
by recompute, FCFS and priority order, and the order of the checks that end a request.

What is not: prefix caching (a moved request says with `cached` what came along), the reserved null
block, the watermark, speculative decoding, encoders, LoRA, and stop strings, which are the
frontend's. There is no I/O and no waiting: a step returns the seconds it would have taken, so the
same engine runs in real time (the caller sleeps) and in virtual time (the caller's clock advances).
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from llumnix.engine.sim.request import FinishReason, Output, SimRequest, StepResult
from llumnix.engine.sim.stream import stream_seed, token_at
from llumnix.latency import PROFILES, LatencyProfile


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The engine's size and rules; the names are vLLM's.

    Raises:
        ValueError: a request of `max_model_len` tokens would not fit into the KV cache alone, which
            vLLM refuses to start with too, or a limit is less than 1.
    """

    total_blocks: int
    block_size: int = 16  # tokens in a KV block
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048  # a step
    max_model_len: int = 2048  # prompt and outputs, tokens
    vocab_size: int = 32_000
    eos: int = 2
    priority: bool = False  # order by priority, then arrival; else by arrival
    profile: LatencyProfile = PROFILES["instant"]

    def __post_init__(self) -> None:
        smallest = min(self.block_size, self.max_num_seqs, self.max_num_batched_tokens)
        if smallest < 1 or self.vocab_size < 2:
            raise ValueError(f"a limit is too small: {self}")
        if self.total_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"{self.total_blocks} blocks of {self.block_size} tokens cannot hold "
                f"one request of {self.max_model_len} tokens"
            )


@dataclass(slots=True, eq=False)
class _Sequence:
    request: SimRequest
    seed: int
    order: tuple[int, int]  # place in the queue, and reversed, the order of preemption
    tokens: int  # prompt and outputs so far
    demand: int  # blocks for all of `tokens`, while it waits
    cached: int
    computed: int = 0  # tokens whose KV is in place
    blocks: int = 0
    scheduled: int = 0  # tokens in this step


def _order(sequence: _Sequence) -> tuple[int, int]:
    return sequence.order


@dataclass(slots=True, eq=False)
class ModelledEngine:
    """Requests in, tokens out, one `step` at a time; see the module for what is modelled."""

    config: ModelConfig
    preemptions: int = field(default=0, init=False)  # since the engine was made
    waiting_blocks: int = field(default=0, init=False)  # asked for by the whole queue
    free_blocks: int = field(init=False)
    held_blocks: int = field(default=0, init=False)  # for requests that are to come
    _running: list[_Sequence] = field(default_factory=list, init=False)
    _waiting: list[_Sequence] = field(default_factory=list, init=False)  # by order
    _known: dict[str, _Sequence] = field(default_factory=dict, init=False)
    _first: int = field(default=0, init=False)  # places taken at the front of the queue, negative
    _last: int = field(default=0, init=False)  # places taken at the end

    def __post_init__(self) -> None:
        self.free_blocks = self.config.total_blocks

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def used_blocks(self) -> int:
        """KV blocks held by running requests."""
        return self.config.total_blocks - self.free_blocks

    @property
    def head_blocks(self) -> int:
        """KV blocks that the head of the queue asks for; 0 for an empty queue."""
        return self._waiting[0].demand if self._waiting else 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._known)

    def held(self) -> dict[str, int]:
        """The running requests in the order they were admitted, and the blocks each holds."""
        return {sequence.request.id: sequence.blocks for sequence in self._running}

    def computed(self, request_id: str) -> int | None:
        """The tokens of a request whose KV is in place; None if it is not here."""
        sequence = self._known.get(request_id)
        return sequence.computed if sequence else None

    def prompt(self, request_id: str) -> Sequence[int]:
        """The prompt of a request that is here."""
        return self._known[request_id].request.prompt

    def hold(self, blocks: int) -> None:
        """Keep so many free blocks from being used, or give them back with a negative number.

        Raises:
            ValueError: there are fewer.
        """
        if blocks > 0 and blocks > self.free_blocks - len(self._running):
            raise ValueError(f"{blocks} KV blocks are needed and {self.free_blocks} are free")
        self.free_blocks -= blocks
        self.held_blocks += blocks

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
        sequence = _Sequence(
            request=request,
            seed=stream_seed(request.prompt),
            order=self._place(request, request.front),
            tokens=tokens,
            demand=0,
            cached=request.cached,
        )
        self._known[request.id] = sequence
        self._enqueue(sequence)

    def abort(self, ids: Iterable[str]) -> list[str]:
        """Drop requests wherever they are; return those that were here."""
        removed = []
        for request_id in ids:
            sequence = self._known.pop(request_id, None)
            if sequence is None:
                continue
            removed.append(request_id)
            if sequence.demand:
                self._waiting.remove(sequence)
                self.waiting_blocks -= sequence.demand
            else:
                self._running.remove(sequence)
                self._release(sequence)
        return removed

    def step(self) -> StepResult:
        """Schedule, compute and sample once; does nothing when there is no work."""
        preempted: list[str] = []
        budget = self._schedule_running(preempted)
        if not preempted:
            self._schedule_waiting(budget)
        seconds = self._seconds()
        return StepResult(seconds, self._compute(), preempted)

    def check(self) -> None:
        """Verify the books.

        Raises:
            AssertionError: they do not balance; the message says where.
        """
        held = 0
        for sequence in self._running:
            needed = -(-sequence.computed // self.config.block_size)
            assert sequence.blocks == needed, f"{sequence} should hold {needed} blocks"
            assert sequence.demand == 0 and sequence.scheduled == 0, f"{sequence} is not settled"
            assert sequence.computed < sequence.tokens, f"{sequence} is ahead of its tokens"
            held += sequence.blocks
        held += self.held_blocks
        assert self.free_blocks >= 0 and self.free_blocks + held == self.config.total_blocks, (
            f"{self.free_blocks} free and {held} held of {self.config.total_blocks} blocks"
        )
        for sequence in self._waiting:
            assert sequence.blocks == sequence.computed == 0, f"{sequence} waits and holds KV"
        assert self.waiting_blocks == sum(s.demand for s in self._waiting), "demand is miscounted"
        assert self._waiting == sorted(self._waiting, key=_order), "the queue is out of order"
        everyone = [s.request.id for s in self._running + self._waiting]
        assert sorted(everyone) == sorted(self._known), "a request is lost or in two places"
        assert len(self._running) <= self.config.max_num_seqs, "the batch is too large"

    def _place(self, request: SimRequest, front: bool) -> tuple[int, int]:
        if front and not self.config.priority:
            self._first -= 1
            return (0, self._first)
        self._last += 1
        return (request.priority if self.config.priority else 0, self._last)

    def _enqueue(self, sequence: _Sequence) -> None:
        sequence.demand = -(-sequence.tokens // self.config.block_size)
        self.waiting_blocks += sequence.demand
        insort(self._waiting, sequence, key=_order)

    def _release(self, sequence: _Sequence) -> None:
        self.free_blocks += sequence.blocks
        sequence.blocks = sequence.computed = sequence.scheduled = 0

    def _schedule_running(self, preempted: list[str]) -> int:
        """Give each running request its tokens and blocks; return what is left of the budget."""
        running, block_size = self._running, self.config.block_size
        budget = self.config.max_num_batched_tokens
        index = 0
        while index < len(running) and budget > 0:
            sequence = running[index]
            new = min(sequence.tokens - sequence.computed, budget)
            needed = -(-(sequence.computed + new) // block_size) - sequence.blocks
            if needed > self.free_blocks:
                victim = self._victim()
                budget += victim.scheduled
                if running.index(victim) < index:
                    index -= 1
                preempted.append(victim.request.id)
                self._preempt(victim)
                if victim is sequence:
                    break
                continue  # the same request tries again
            if needed:
                self.free_blocks -= needed
                sequence.blocks += needed
            sequence.scheduled = new
            budget -= new
            index += 1
        return budget

    def _victim(self) -> _Sequence:
        return max(self._running, key=_order) if self.config.priority else self._running[-1]

    def _preempt(self, victim: _Sequence) -> None:
        self.preemptions += 1
        self._running.remove(victim)
        self._release(victim)
        victim.cached = 0
        if not self.config.priority:
            victim.order = self._place(victim.request, front=True)
        self._enqueue(victim)

    def _schedule_waiting(self, budget: int) -> None:
        waiting, block_size = self._waiting, self.config.block_size
        while budget > 0 and waiting and len(self._running) < self.config.max_num_seqs:
            sequence = waiting[0]
            if sequence.demand > self.free_blocks:
                return  # first come, first served: nobody overtakes the head of the queue
            del waiting[0]
            self.waiting_blocks -= sequence.demand
            sequence.demand = 0
            # The last token is always computed, for it is what the next one is sampled from.
            reused = min(sequence.cached, sequence.tokens - 1) // block_size * block_size
            sequence.computed = reused
            sequence.scheduled = min(sequence.tokens - reused, budget)
            sequence.blocks = -(-(reused + sequence.scheduled) // block_size)
            self.free_blocks -= sequence.blocks
            budget -= sequence.scheduled
            self._running.append(sequence)

    def _seconds(self) -> float:
        prefill = squares = batch = context = 0
        for sequence in self._running:
            new, computed = sequence.scheduled, sequence.computed
            if new == 1:
                batch += 1
                context += computed + 1
            elif new:
                prefill += new
                squares += (2 * computed + new) * new
        return self.config.profile.step_seconds(prefill, batch, context, squares)

    def _compute(self) -> list[Output]:
        outputs = []
        ended = False
        for sequence in self._running:
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
                    self._release(sequence)
        if ended:
            self._running = [s for s in self._running if s.blocks]
        return outputs

    def _sample(self, sequence: _Sequence) -> tuple[int, FinishReason | None]:
        request, config = sequence.request, self.config
        position = sequence.tokens - len(request.prompt)
        sequence.tokens += 1
        if position + 1 == request.ends_at:
            return config.eos, FinishReason.STOP
        token = token_at(sequence.seed, position, config.vocab_size, (config.eos,))
        if token in request.stop_token_ids:
            return token, FinishReason.STOP
        if position + 1 >= request.max_tokens or sequence.tokens >= config.max_model_len:
            return token, FinishReason.LENGTH
        return token, None
