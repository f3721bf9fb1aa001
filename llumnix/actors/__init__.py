"""The actors of a node. Thin: they hold decisions and state, and call plain objects."""
