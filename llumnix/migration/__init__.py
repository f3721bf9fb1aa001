"""Live migration: all of a move, from the command to the hand-over."""
