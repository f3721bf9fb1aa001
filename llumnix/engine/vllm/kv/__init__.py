"""KV blocks of a vLLM engine: held by its scheduler, and carried from worker to worker."""
