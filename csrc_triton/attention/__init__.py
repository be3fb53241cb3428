"""Shaw attention over packed utterances, and its gradients."""

from .backward import shaw_attention_backward
from .forward import shaw_attention
from .tile_map import build_tile_map, tile_bound

__all__ = [
    "build_tile_map",
    "shaw_attention",
    "shaw_attention_backward",
    "tile_bound",
]
