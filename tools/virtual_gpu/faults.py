"""What an execution ends with when a kernel does what it must not, or what is not modelled."""

from __future__ import annotations

import numpy as np


class UnsupportedError(Exception):
    """PTX that there is no rule for. It says nothing about whether the kernel is right."""


class Fault(Exception):
    """A kernel did what it must not. Raised without its place, which the executor adds."""

    def __init__(self, message: str, threads: np.ndarray | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.threads = threads


def ranges(threads: np.ndarray) -> str:
    """`0-31, 64`: sorted thread numbers in few words."""
    threads = np.unique(threads)
    parts = np.split(threads, np.flatnonzero(np.diff(threads) != 1) + 1)
    said = [str(p[0]) if p.size == 1 else f"{p[0]}-{p[-1]}" for p in parts[:4]]
    return ", ".join(said) + (", ..." if len(parts) > 4 else "")
