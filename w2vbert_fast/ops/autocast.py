"""Casts of weights under autocast, kept for as long as PyTorch keeps its own: for one region.

In a region of `torch.autocast` PyTorch casts a float32 leaf that requires a gradient once, and
drops the cast when the outermost region ends, which Python cannot see. So a scalar is cast by
PyTorch beside the first weight: while its cast lives, the region lasts, and with it the casts here.
As in PyTorch, nothing is kept with `cache_enabled=False` or after `torch.clear_autocast_cache()`.
Unlike there, a weight that was written to is cast again, and what was cast without recording a
gradient is not handed to a call that needs one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset({Tensor, nn.Parameter})

_casts: dict[tuple[Any, ...], tuple[Tensor, Tensor, tuple[int, int]]] = {}
"""By identity, view and dtype of a tensor and how it is recorded: the tensor, its cast, and the
state of its values when it was cast."""
_regions: dict[str, weakref.ref[Tensor]] = {}
"""By type of device the cast of PyTorch's that lives as long as the region."""


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value.to(dtype)`, for a weight the same tensor again until the region of autocast ends."""
    leaf = value._base if value._is_view() else value
    if (
        value.dtype != torch.float32
        or leaf is None
        or type(value) not in _PLAIN
        or type(leaf) not in _PLAIN
        or not (leaf.requires_grad and leaf.is_leaf)
        or leaf.is_inference()
        or torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or not _region_lasts(value.device.type)
    ):
        return value.to(dtype)
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    key = (id(leaf), value.shape, value.stride(), value.storage_offset(), dtype, *modes)
    state = (value.data_ptr(), leaf._version)
    found = _casts.get(key)
    if found is None or found[2] != state:
        found = (leaf, value.to(dtype), state)
        if type(found[1]) is Tensor:
            _casts[key] = found
    return found[1]


@contextlib.contextmanager
def without_kept_casts() -> Iterator[None]:
    """In this block every cast is made anew, by PyTorch's operations too."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _region_lasts(device_type: str) -> bool:
    """Whether PyTorch keeps casts now; if it is a new region, what was kept is gone."""
    if not torch.is_autocast_cache_enabled():
        return False
    region = _regions.get(device_type)
    if region is not None and region() is not None:
        return True
    with torch.inference_mode(False), torch.enable_grad():
        like: dict[str, Any] = {"device": device_type, "requires_grad": True}
        product = torch.mm(torch.zeros(0, 1, **like), torch.zeros(1, 1, **like))
        try:
            kept: Tensor = product.grad_fn._saved_mat2  # type: ignore[union-attr]
        except AttributeError:  # of another PyTorch
            return False
    del product
    _regions[device_type] = weakref.ref(kept, lambda _: _casts.clear())
    del kept
    return _regions[device_type]() is not None
