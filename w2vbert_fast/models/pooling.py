"""What is done to hidden states behind the encoder: normalisation by statistics, means, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from w2vbert_fast.layout import PackedBatch, sequence_ids

Statistics = Sequence[Tensor] | Mapping[str, Tensor]


def mean_over_frames(x: Tensor, layout: PackedBatch) -> Tensor:
    """Mean over each utterance's valid frames: `[N, C]` -> `[batch, C]`.

    Summed in fp32 (float64 stays). An utterance without frames gives zeros.
    """
    x, layout = layout.valid_part(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    ids = sequence_ids(layout.cu_seqlens, x.shape[0])
    total = x.new_zeros(layout.batch_size, x.shape[1], dtype=wide).index_add(0, ids, x.to(wide))
    counts = layout.cu_seqlens.diff().clamp(min=1)
    return (total / counts.to(wide)[:, None]).to(x.dtype)


def left_aligned(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows shifted so that their first token comes first: `[batch, T, C]` and int64 numbers of
    tokens `[batch]`. What lies behind an utterance's end is zero."""
    frames = torch.arange(x.shape[1], device=x.device)
    start = tokens.to(torch.int64).argmax(dim=1)
    lengths = tokens.sum(dim=1)
    rows = (frames + start[:, None]).clamp(max=x.shape[1] - 1)
    x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
    return x.masked_fill((frames >= lengths[:, None])[..., None], 0.0), lengths


def without_padding(x: Tensor, mask: Tensor) -> Tensor:
    """`[batch, T, C]` with zeros where bool `[batch, T]` is `False`."""
    return x.masked_fill(~mask[..., None], 0.0)


def checked_statistics(stats: Statistics, width: int) -> tuple[Tensor, Tensor]:
    """Mean and variance `[width]` each from a pair, or from a mapping with "mean" and "var".

    Raises:
        TypeError: `stats` is neither.
        ValueError: a part is missing, has another shape, or the variance is not above zero.
    """
    if isinstance(stats, Mapping):
        missing = [name for name in ("mean", "var") if name not in stats]
        if missing:
            raise ValueError(
                f"stats has no {' and no '.join(missing)} (it has {', '.join(map(str, stats))})"
            )
        parts = [stats["mean"], stats["var"]]
    elif isinstance(stats, Sequence) and len(stats) == 2:
        parts = list(stats)
    else:
        raise TypeError(
            f"stats is {type(stats).__name__}; it must be a pair (mean, var) or a mapping with "
            "the entries mean and var"
        )
    for name, part in zip(("mean", "var"), parts, strict=True):
        if not isinstance(part, Tensor) or part.numel() != width or not part.is_floating_point():
            came = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"stats: {name} is {came}; it must be a floating point tensor of {width} values"
            )
    mean, variance = (part.detach().reshape(width) for part in parts)
    if not bool((variance > 0).all()):
        raise ValueError("stats: var has values that are not above 0")
    return mean, variance


def normalize_with_statistics(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """`(x - mean) / sqrt(variance)`: `[N, C]`, statistics `[C]`.

    Half-precision states become the statistics' dtype, as in the pipelines that ship such files
    (IndexTTS2, MaskGCT).
    """
    mean, variance = mean.to(x.device), variance.to(x.device)
    return (x - mean) / torch.sqrt(variance)
