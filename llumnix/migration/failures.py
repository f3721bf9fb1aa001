"""Whether a move that failed says something about its pair, or the next may be made at once."""

import re

from llumnix.engine.base import EngineError
from llumnix.migration.errors import Ended

# Errors come from other nodes as their sentences, and nothing else of them does.
_BLAMELESS = re.compile(
    r"^request \S+ has ended$"
    r"|^request \S+ is not at instance "
    r"|^no request of \S+ would fit "
    r"|^no request of \S+ waits any more"
    r"|KV blocks are needed and \d+ are free"
    r"|^\d+ (requests|KV blocks would) (leave|come to) instance "
)


def is_blameless(error: EngineError) -> bool:
    """Whether the request has ended, nothing fits the destination, or one of both has no room now.

    Nothing of that makes the pair any worse for the next move.
    """
    return isinstance(error, Ended) or _BLAMELESS.search(str(error)) is not None
