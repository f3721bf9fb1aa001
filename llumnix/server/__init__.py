"""The aiohttp application of a node."""
