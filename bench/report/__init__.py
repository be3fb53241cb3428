"""Measurements and the cost ledger as one HTML page: `python -m bench.report`."""
