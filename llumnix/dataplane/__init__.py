"""The data plane: requests and their tokens, between API servers and instances, on any node."""
