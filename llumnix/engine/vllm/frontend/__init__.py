"""vLLM's frontend as this server has it: its handlers, and what a request may cost in them."""
