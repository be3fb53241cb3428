"""Shaw attention over packed utterances, and its gradients."""

from csrc_triton.attention.backward import shaw_attention_backward
from csrc_triton.attention.forward import shaw_attention
from csrc_triton.attention.tile_map import build_tile_map, tile_bound

__all__ = [
    "build_tile_map",
    "shaw_attention",
    "shaw_attention_backward",
    "tile_bound",
]
