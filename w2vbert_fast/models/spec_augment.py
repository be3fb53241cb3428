"""SpecAugment (Park et al. 2019) on hidden states, with the reference's rules for span counts."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_mask_spans(
    lengths: list[int] | tuple[int, ...],
    size: int,
    *,
    mask_prob: float,
    mask_length: int,
    min_masks: int = 0,
) -> Tensor:
    """Random spans to mask along one axis.

    A row of n positions gets `floor(mask_prob * n / mask_length + u)` spans, u uniform in [0, 1)
    and drawn once for all rows, at least `min_masks`, and never more than there are distinct
    starts. Spans may overlap. A row shorter than `mask_length` gets none.

    Args:
        lengths: positions of each row that may be masked.
        size: width of the result, at least the largest length.
        mask_prob: share of the positions to mask if spans did not overlap, 0..1.
        mask_length: positions in a span.
        min_masks: fewest spans in a row.

    Returns:
        bool `[len(lengths), size]` on the CPU, from torch's default generator.
    """
    rounding = torch.rand(()).item()
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    for row, length in enumerate(lengths):
        starts = length - mask_length + 1
        if starts < 1:
            continue
        spans = max(int(mask_prob * length / mask_length + rounding), min_masks)
        spans = min(spans, length // mask_length, starts)
        first = torch.randperm(starts)[:spans]
        mask[row, (first[:, None] + torch.arange(mask_length)).flatten()] = True
    return mask
