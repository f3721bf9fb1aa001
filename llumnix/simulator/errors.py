"""What is wrong with a description of a run, in one sentence."""


class SimConfigError(ValueError):
    """A run cannot be made from what was given; the message names the key or the file."""
