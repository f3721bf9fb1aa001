"""Virtual time over the modelled engine and the production policies."""
