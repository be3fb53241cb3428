"""Memory allocated without a value, made to hold what no kernel writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

POISON_INTEGER = -7_777_777


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a buffer with what no kernel writes: NaN, or one odd integer."""
    with torch.no_grad():
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int32, torch.int64):
            return tensor.fill_(POISON_INTEGER)
        return tensor


def poison_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on memory allocated without a value holds NaN, integers `POISON_INTEGER`."""

    def poisoned(allocate: Any) -> Any:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
