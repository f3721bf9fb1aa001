"""Whatever arrives in whatever order, each position is accepted once, and in order."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llumnix.dataplane.ledger import Acceptance, Ledger

INSTANCES = st.sampled_from(["a-0", "a-1", "b-0"])
TOKENS = 6  # enough for duplicates, gaps and overlaps of every kind


@dataclass
class Stream:
    """What a client has seen of one request, kept beside the ledger in the simplest way."""

    epoch: int = 0
    owner: str | None = None
    seen: list[tuple[int, int]] = field(default_factory=list)  # position, token


class LedgerMachine(RuleBasedStateMachine):
    """Outputs of every epoch come in any order, any number of times, beside moves and closes."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.streams: dict[str, Stream] = {}
        self.dropped: Counter[Acceptance] = Counter()
        self.names = 0

    @rule(target=requests)
    def open(self) -> str:
        self.names += 1
        name = f"r{self.names}"
        self.ledger.open(name, object())
        self.streams[name] = Stream()
        return name

    @rule(name=requests)
    def open_again(self, name: str) -> None:
        if name in self.streams:
            with pytest.raises(ValueError, match=name):
                self.ledger.open(name, object())

    @rule(name=requests, owner=INSTANCES)
    def move(self, name: str, owner: str) -> None:
        if name not in self.streams:
            with pytest.raises(KeyError):
                self.ledger.move(name, owner)
            return
        stream = self.streams[name]
        stream.epoch, stream.owner = stream.epoch + 1, owner
        assert self.ledger.move(name, owner).epoch == stream.epoch

    @rule(
        name=requests,
        back=st.integers(0, 2),
        position=st.integers(0, TOKENS),
        count=st.integers(0, 3),
    )
    def output(self, name: str, back: int, position: int, count: int) -> None:
        """An owner of this epoch, or of one `back`, sends `count` tokens from `position` on."""
        stream = self.streams.get(name)
        epoch = (stream.epoch if stream else 1) - back
        # Each epoch generates other tokens, so that a stale one would be seen in the stream.
        tokens = [1000 * epoch + position + n for n in range(count)]
        if stream is None:
            expected = Acceptance.UNKNOWN
        elif back:
            expected = Acceptance.STALE
        elif position == len(stream.seen):
            expected = Acceptance.ACCEPTED
            stream.seen += list(enumerate(tokens, start=position))
        else:
            expected = Acceptance.REPEATED if position < len(stream.seen) else Acceptance.GAP
        if expected is not Acceptance.ACCEPTED:
            self.dropped[expected] += 1
        assert self.ledger.accept(name, epoch, position, tokens) is expected

    @rule(name=requests, count=st.integers(1, 3))
    def next_output(self, name: str, count: int) -> None:
        """The rightful owner goes on."""
        if stream := self.streams.get(name):
            self.output(name, 0, len(stream.seen), count)

    @rule(name=consumes(requests))
    def close(self, name: str) -> None:
        stream = self.streams.pop(name, None)
        entry = self.ledger.close(name)
        assert (entry is None) == (stream is None)
        assert self.ledger.close(name) is None

    @rule(name=requests)
    def close_and_listen(self, name: str) -> None:
        """A closed request may still get outputs."""
        self.streams.pop(name, None)
        self.ledger.close(name)

    @invariant()
    def each_position_once_and_in_order(self) -> None:
        assert len(self.ledger) == len(self.streams)
        for name, stream in self.streams.items():
            entry = self.ledger.get(name)
            assert entry is not None and name in self.ledger
            assert list(enumerate(entry.tokens)) == stream.seen
            assert entry.position == len(stream.seen)
            assert (entry.epoch, entry.owner) == (stream.epoch, stream.owner)

    @invariant()
    def what_was_dropped_is_counted(self) -> None:
        assert self.ledger.dropped == self.dropped

    @invariant()
    def owners_are_known(self) -> None:
        for owner in ("a-0", "a-1", "b-0"):
            mine = {name for name, stream in self.streams.items() if stream.owner == owner}
            assert {name for name, _ in self.ledger.owned_by(owner)} == mine


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=40)


def test_requests_may_end_while_an_owners_are_walked_through() -> None:
    ledger = Ledger()
    for n in range(5):
        ledger.open(f"r{n}", None)
        ledger.move(f"r{n}", "a-0")
    for name, _ in ledger.owned_by("a-0"):
        ledger.close(name)
    assert len(ledger) == 0
