"""The command lines, and the wiring of a node."""
