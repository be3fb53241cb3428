"""Linear layers with what follows them, and their gradients."""

from .backward import (
    feed_forward_backward,
    linear_backward,
    linear_glu_backward,
    linear_residual_backward,
)
from .forward import linear, linear_glu, linear_residual

__all__ = [
    "feed_forward_backward",
    "linear",
    "linear_backward",
    "linear_glu",
    "linear_glu_backward",
    "linear_residual",
    "linear_residual_backward",
]
