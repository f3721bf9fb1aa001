"""vLLM itself, unpatched: starting it, talking to it, and its frontend above llumnix's client."""
