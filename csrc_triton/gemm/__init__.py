"""Linear layers with what follows them, and their gradients."""

from .backward import (
    activation_backward,
    feed_forward_backward,
    glu_backward,
    linear_backward,
    linear_glu_backward,
)
from .forward import linear, linear_glu

__all__ = [
    "activation_backward",
    "feed_forward_backward",
    "glu_backward",
    "linear",
    "linear_backward",
    "linear_glu",
    "linear_glu_backward",
]
