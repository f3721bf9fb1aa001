"""Grammars of requests: tried before an engine sees them, and held to their time in it."""
