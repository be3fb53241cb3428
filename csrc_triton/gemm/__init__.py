"""Linear layers with what follows them, and their gradients."""

from csrc_triton.gemm.backward import (
    epilogue_backward,
    feed_forward_backward,
    linear_backward,
    linear_glu_backward,
)
from csrc_triton.gemm.forward import linear, linear_glu

__all__ = [
    "epilogue_backward",
    "feed_forward_backward",
    "linear",
    "linear_backward",
    "linear_glu",
    "linear_glu_backward",
]
