"""The size and the rules of a modelled engine."""

from dataclasses import dataclass

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
    # A step prefills whole prompts from the queue, or, if none fits, decodes; as vLLM 0.1 did.
    prefill_first: bool = False
    # A step is made up when the one before it begins, so what comes meanwhile waits for the next.
    async_scheduling: bool = False
    watermark: float = 0.0  # share of the KV blocks that an admission leaves free
    silent: bool = False  # outputs are counted, and their tokens not worked out: each is 0
    profile: LatencyProfile = PROFILES["instant"]

    def __post_init__(self) -> None:
        smallest = min(self.block_size, self.max_num_seqs, self.max_num_batched_tokens)
        if smallest < 1 or self.vocab_size < 2 or not 0 <= self.watermark < 1:
            raise ValueError(f"a limit is too small: {self}")
        if self.prefill_first and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError("without chunks, a step must be able to prefill the longest request")
        if self.total_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"{self.total_blocks} blocks of {self.block_size} tokens cannot hold "
                f"one request of {self.max_model_len} tokens"
            )

    @property
    def watermark_blocks(self) -> int:
        """KV blocks that an admission leaves free."""
        return int(self.watermark * self.total_blocks)
