"""Measurements that answer one question each, outside of `python -m bench`."""
