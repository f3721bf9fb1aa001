"""Whether the tokens of a stream are the right ones, and what is wrong with those that aren't."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llumnix.engine.sim.request import stream_seed, token_at

NEAR = 64  # positions around its own at which a token that is not the right one is looked for


@dataclass
class Verdict:
    """What is known of a stream's tokens so far."""

    right: list[int]
    position: int = 0  # in the right answer, of the next token
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether each token was the next of the right answer."""
        return not (self.lost or self.doubled or self.wrong)

    def take(self, tokens: Sequence[int]) -> None:
        """The next tokens of the stream."""
        for number, token in enumerate(tokens):
            if self.position < len(self.right) and token == self.right[self.position]:
                self.position += 1
                continue
            here = self._where(tokens[number : number + 3])
            self.notes.append(f"token {token} at {self.position}, which stands at {here}")
            if here is None:
                self.wrong += 1
                self.position += 1
            elif here > self.position:
                self.lost += here - self.position
                self.position = here + 1
            else:
                self.doubled += self.position - here
                self.position = here + 1

    def end(self) -> None:
        """The stream has ended without an error: nothing may be missing."""
        if self.position < len(self.right):
            self.lost += len(self.right) - self.position
            self.notes.append(f"it ended after {self.position} tokens of {len(self.right)}")

    def _where(self, tokens: Sequence[int]) -> int | None:
        """The place at which these tokens stand in the right answer, near the present one."""
        first, last = max(self.position - NEAR, 0), min(self.position + NEAR, len(self.right))
        places = [p for p in range(first, last) if self.right[p : p + len(tokens)] == tokens]
        return min(places, key=lambda p: abs(p - self.position), default=None)


def right_answer(prompt: Sequence[int], length: int, vocabulary: int, end: int) -> list[int]:
    """The tokens that a modelled device generates for a prompt; `end` is never among them."""
    seed = stream_seed(prompt)
    return [token_at(seed, position, vocabulary, (end,)) for position in range(length)]
