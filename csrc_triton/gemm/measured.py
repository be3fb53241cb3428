"""Tiles that were measured on a device, which linear layers take in place of predicted ones.

Nothing here measures or reads a file: who has measured says so by `use`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from csrc_triton import plans
from csrc_triton.gemm.config import LinearConfig


@dataclass(frozen=True)
class Product:
    """A matrix product and what follows it in the same kernel.

    Attributes:
        num_tokens: rows of the product.
        product_columns: columns of the product: rows of the weight.
        in_features: columns of the inputs, K.
        dtype: of the inputs.
        epilogue: an activation's name in `functions.ACTIVATIONS`, "identity" for none, or "glu".
    """

    num_tokens: int
    product_columns: int
    in_features: int
    dtype: torch.dtype
    epilogue: str


Find = Callable[[torch.device, Product], LinearConfig | None]
"""The tile for a product on a device; `None`: the predicted one."""

_find: Find | None = None


def use(find: Find | None) -> None:
    """Ask `find` before predicting; `None`: predict. Plans that were made before are dropped."""
    global _find
    _find = find
    plans.forget()


def measured_config(device: torch.device, product: Product) -> LinearConfig | None:
    """The tile that was measured to be the best one; `None` where none was."""
    return None if _find is None else _find(device, product)
