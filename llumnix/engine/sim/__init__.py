"""A modelled engine: vLLM's scheduling rules without a model, for tests and for virtual time."""
