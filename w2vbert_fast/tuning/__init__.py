"""Measuring what is fastest on this GPU."""
