"""Connections: accepting them, their heads and bodies, their limits, and clients that leave."""
