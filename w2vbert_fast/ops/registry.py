"""Registration of operations as `torch.ops.w2vbert.*`.

`torch.library.custom_op` does the same with more checks at every call: 15 microseconds of Python,
against 4 for what is registered here (two cores of a server, without gradients). An encoder of 24
layers makes 340 calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("w2vbert", "FRAGMENT")  # type: ignore[no-untyped-call]
# Compilers hand over tensors with the strides that they would have without compilation.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def operation(
    schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as `torch.ops.w2vbert.<name>`, for every device and without a gradient.

    Args:
        schema: such as `"linear(Tensor x, Tensor weight) -> Tensor"`. No argument is written to and
            no result shares memory with an argument or with another result.
        fake: the same signature; gives results of the right shape, strides and dtype without
            computing anything.

    Returns:
        A decorator. In the function's place it leaves the registered operation.
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=_TAGS)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"w2vbert::{name}", fake, lib=_LIBRARY)
        registered: Callable[..., Any] = getattr(torch.ops.w2vbert, name).default
        return registered

    return register
