"""The boundary to an inference engine: everything that knows vLLM lives below this package."""
