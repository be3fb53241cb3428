"""Recordings as they come in: what inference and training both read."""
