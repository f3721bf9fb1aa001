"""Entry points that take the place of vLLM's own."""
