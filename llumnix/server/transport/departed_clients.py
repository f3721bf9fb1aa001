"""What is left to do about clients that have left: a little in each turn of the event loop.

When a thousand of them leave at once, streams of others go on in between. What they have asked for
ends before all of this, in the turn in which that is seen: it must not go on to cost anything.
"""

from llumnix.loop_turns import Turns

CLOSING = 32  # connections that are closed in one turn: a millisecond or two
ENDING = 8  # handlers that end in one: some milliseconds with the whole stack of vLLM's


class Leaving:
    """The turns of one server's connections."""

    def __init__(self) -> None:
        self.closing = Turns(CLOSING)
        self.ending = Turns(ENDING)
