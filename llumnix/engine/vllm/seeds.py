"""Random generators of seeded requests, for model runner V1 (V2 hashes seed and position instead).

Such a generator stands where the request's last token left it. A request that comes with outputs
needs one that has drawn what those took.
"""

import hashlib
from typing import Any

import torch


class CpuGenerator(torch.Generator):
    """A generator that can take back the draw of one step.

    The runner samples for a request also while its tokens are still being computed in chunks, and
    then moves the generator's offset back. On a CPU there is no offset, and the engine would die of
    it: rarely of a new request, whose prompt must be long, but of a resumed one whenever several
    come at once.
    """

    _before: torch.Tensor | None = None

    def mark(self) -> None:
        """Remember where it stands, before a step."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        """Whatever: it is only given back to `set_offset`, changed."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Stand where the step began."""
        assert self._before is not None
        self.set_state(self._before)


def ready(generator: torch.Generator, seed: int, outputs: int, runner: Any) -> torch.Generator:
    """The generator of a new request of this seed, which has so many outputs."""
    if generator.device.type == "cpu":
        generator = CpuGenerator().manual_seed(seed)
    if not outputs:
        return generator
    if runner.speculative_config is not None:
        return _of_position(generator, seed, outputs)
    _draw(generator, outputs, runner)
    return generator


def before_step(runner: Any) -> None:
    """Called when a step's requests are known and nothing has been drawn for it."""
    # With speculative decoding a step draws as much as drafts happen to be accepted, which is not
    # known afterwards: then each step begins anew, by its position. (Where the scheduler is a step
    # ahead the position is not known either; a request that has moved goes on as if with another
    # seed.)
    by_position = runner.speculative_config is not None and not runner.use_async_scheduling
    for index, generator in runner.input_batch.generators.items():
        if by_position:
            state = runner.requests[runner.input_batch.req_ids[index]]
            _of_position(generator, state.sampling_params.seed, len(state.output_token_ids))
        if isinstance(generator, CpuGenerator):
            generator.mark()


def _of_position(generator: torch.Generator, seed: int, position: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=7).digest()
    return generator.manual_seed(int.from_bytes(digest, "big"))


def _draw(generator: torch.Generator, outputs: int, runner: Any) -> None:
    """Draw what vLLM's sampler has drawn for so many outputs."""
    sampler = runner.sampler.topk_topp_sampler
    double = getattr(sampler, "use_fp64_gumbel", False)
    fused = hasattr(torch.ops._C, "fused_gumbel_argmax")  # since 0.31
    if sampler.forward.__name__ == "forward_cpu" and fused and not double:
        torch.randint(0, 2**31, (outputs,), generator=generator, dtype=torch.long)
        return
    noise = torch.empty(
        runner.input_batch.vocab_size,
        dtype=torch.float64 if double else torch.float32,
        device=generator.device,
    )
    for _ in range(outputs):
        noise.exponential_(generator=generator)
