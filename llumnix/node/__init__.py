"""A node: what it starts, in which order, and how it stops."""
