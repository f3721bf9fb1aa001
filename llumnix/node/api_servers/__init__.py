"""A node's API servers: one in the node's own process, or several in processes of theirs."""
