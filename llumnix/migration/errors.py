"""Why a migration is not made: a sentence for people, and a kind for the nodes that go by it."""

from enum import StrEnum

from llumnix.engine.base import EngineDead, EngineError, NoRoom, RequestEnded, SetupFailed


class FailureKind(StrEnum):
    """What a node has to know of a failure beside its sentence."""

    ENDED = "ended"  # the request is not there any more: there is nothing to move
    NO_ROOM = "no room"  # no request fits the destination now, or too many move there already
    NO_WAY = "no way"  # the two instances found no way for KV blocks
    DEAD = "dead"  # an engine is gone
    OTHER = "other"

    @classmethod
    def _missing_(cls, value: object) -> "FailureKind":
        return cls.OTHER  # a kind of a later version


# A pair is none the worse for these: the next move may be tried at once.
BLAMELESS = frozenset({FailureKind.ENDED, FailureKind.NO_ROOM})

_KINDS: dict[type[EngineError], FailureKind] = {
    RequestEnded: FailureKind.ENDED,
    NoRoom: FailureKind.NO_ROOM,
    SetupFailed: FailureKind.NO_WAY,
    EngineDead: FailureKind.DEAD,
}


class MigrationError(EngineError):
    """A migration that is not made; the request goes on where it is."""

    def __init__(self, sentence: str, kind: FailureKind = FailureKind.OTHER) -> None:
        super().__init__(sentence)
        self.kind = kind


class Ended(MigrationError):
    """The request has ended, or left otherwise, so that there is nothing to move any more."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, FailureKind.ENDED)


def kind_of(error: Exception) -> FailureKind:
    """What kind of failure an error is, of a migration or of an engine."""
    if isinstance(error, MigrationError):
        return error.kind
    kinds = (kind for cause, kind in _KINDS.items() if isinstance(error, cause))
    return next(kinds, FailureKind.OTHER)


def error_of(kind: FailureKind, sentence: str) -> EngineError:
    """The error that another node's failure is here."""
    if kind is FailureKind.DEAD:
        return EngineDead(sentence)
    if kind is FailureKind.NO_WAY:
        return SetupFailed(sentence)
    return MigrationError(sentence, kind)
