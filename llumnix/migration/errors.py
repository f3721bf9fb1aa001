"""Why a migration is not made."""

from llumnix.engine.base import EngineError


class MigrationError(EngineError):
    """A migration that is not made; the request goes on where it is."""


class Ended(MigrationError):
    """The request has ended, or left otherwise, so that there is nothing to move any more."""
