"""Small launches of the kernels that ship, for proofs: several blocks, the last one not full.

The launchers are called with few tokens of the published widths, or of narrower ones where the
kernel is the same; what is compiled does not change, which `small_launches` is keyed by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from csrc_triton.gemm.config import linear_candidates
from tools.compile.shipped import (
    PUBLISHED,
    WAVEFORMS,
    Variant,
    launch,
    launched_operations,
    tiles,
    variants,
)
from tools.compile.target import Target
from tools.virtual_gpu.requests import Uncompiled, requests
from w2vbert_fast.ops.examples import Sizes

# By operation or variant. An utterance begins inside a block of rows, and ends inside another one.
_SIZES: dict[str, Mapping[str, Any]] = {
    "layer_norm": {"lengths": (9,)},
    "layer_norm_backward": {"lengths": (5,)},
    "linear_backward": {"lengths": (17,), "width": 64, "inner": 512},
    "linear_glu_backward": {"lengths": (17,), "width": 512},
    "feed_forward_backward": {"lengths": (17,), "width": 64, "inner": 512},
    "conv_norm_act": {"lengths": (3, 34)},
    "shaw_attention": {"lengths": (100,)},
    "shaw_attention_backward": {"lengths": (150,), "heads": 1},
    "characters": {"lengths": (3, 126)},
    "word_pieces": {"lengths": (2, 3), "vocabulary": 1040},
    "normalize_and_stack": {"lengths": (3, 514)},
}
for _name in ("residual_layer_norm", "residual_double_layer_norm"):
    for _pass in ("", "_backward"):
        _SIZES[_name + _pass] = _SIZES["layer_norm" + _pass]

# Kernels of which some blocks are enough, or do more than one step each in a smaller grid; and
# arguments that leave each block of attention one tile.
_PARTS: dict[str, tuple[tuple[int, int, int], Mapping[str, int]]] = {
    "linear": ((4, 1, 1), {}),
    "conv_norm_act_fwd": ((4, 1, 1), {}),
    "norm_bwd": ((2, 1, 1), {}),
    "norm_act_bwd": ((2, 1, 1), {}),
    "epilogue_bwd": ((2, 2, 1), {}),
    "shaw_attention_fwd": ((2, 1, 1), {"num_work": 2}),
    "shaw_attention_bwd_distances": ((4, 1, 1), {}),
}


def _two_waveforms(sizes: Sizes) -> Mapping[str, Any]:
    """Of 4 frames and of 34."""
    return {"waveforms": torch.zeros(6700), "cu_seqlens": torch.tensor([0, 1000, 6700]).int()}


def _part(request: Uncompiled) -> Uncompiled:
    most, values = _PARTS.get(request.name, (request.grid, {}))
    x, y, z = map(min, zip(request.grid, most, strict=True))
    arguments = [
        dataclasses.replace(argument, value=values.get(argument.name, argument.value))
        for argument in request.arguments
    ]
    return dataclasses.replace(request, grid=(x, y, z), arguments=arguments)


def _calls(
    target: Target, dtype: str
) -> Iterator[tuple[tuple[str, Variant, Sizes], dict[str, Any]]]:
    """The first arguments of `launch`, and options of the launcher."""
    for operation in launched_operations(dtype):
        for name, variant in variants(operation).items():
            if operation in ("linear", "linear_glu"):
                # Two by two tiles, the last row past the first; a few steps over the features.
                for config in linear_candidates(getattr(torch, dtype), target.arch):
                    sizes = Sizes(
                        lengths=(config.block_m + 1,),
                        width=4 * config.block_k,
                        inner=config.block_n + 16,
                    )
                    if "width" in variant.sizes:
                        sizes = dataclasses.replace(sizes, width=variant.sizes["width"])
                    plain = dataclasses.replace(variant, sizes={})
                    yield (operation, plain, sizes), {"config": config}
                continue
            sizes = Sizes() if operation in WAVEFORMS else PUBLISHED
            forward = operation.removesuffix("_backward")
            small = _SIZES.get(operation) or _SIZES.get(name) or _SIZES.get(forward, {})
            variant = dataclasses.replace(variant, sizes={**variant.sizes, **small})
            if operation == "log_mel_filterbank":
                variant = dataclasses.replace(variant, changes=_two_waveforms)
            for options in tiles(operation, dtype, target.arch):
                yield (operation, variant, sizes), options


def small_launches(target: Target, dtype: str) -> dict[str, Uncompiled]:
    """A launch of each kernel that ships, by its key."""
    found: dict[str, Uncompiled] = {}
    for (operation, variant, sizes), options in _calls(target, dtype):
        with requests(target.gpu) as asked, torch.no_grad():
            launch(operation, variant, sizes, dtype, "cpu", **options)
        for request in asked:
            found.setdefault(request.key, _part(request))
    return found
