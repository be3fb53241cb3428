"""Padding feature rows to one length, and the arguments that say how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.processing.batch import BatchFeature

PADDING_STRATEGIES = ("longest", "max_length", "do_not_pad")


def padding_strategy(padding: object, max_length: int | None) -> str:
    """Normalises a `padding` argument to "longest", "max_length" or "do_not_pad".

    Args:
        padding: True ("longest"), False ("do_not_pad") or one of the three names.
        max_length: Needed by "max_length".

    Raises:
        ValueError: `padding` is none of these, or "max_length" comes without a length.
    """
    if isinstance(padding, bool):
        return "longest" if padding else "do_not_pad"
    for strategy in PADDING_STRATEGIES:
        if isinstance(padding, str) and padding == strategy:
            if strategy == "max_length" and max_length is None:
                raise ValueError("padding='max_length' needs max_length, got None")
            return strategy
    raise ValueError(f"padding must be True, False or one of {PADDING_STRATEGIES}, got {padding!r}")


def round_up(length: int, multiple: int | None) -> int:
    """The smallest multiple of `multiple` that is at least `length`; `length` for None."""
    return length if multiple is None else -(-length // multiple) * multiple


def check_length_arguments(
    max_length: int | None, truncation: bool, pad_to_multiple_of: int | None
) -> None:
    """Raises ValueError for lengths below 1 and for truncation without a length."""
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1, got {pad_to_multiple_of}")
    if truncation and max_length is None:
        raise ValueError("truncation=True needs max_length, got None")


def pad_rows(
    rows: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    *,
    strategy: str,
    max_length: int | None,
    truncation: bool,
    multiple: int | None,
    side: str,
    value: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Cuts and pads features and their masks.

    Args:
        rows: Features of each utterance, ``[num_frames, num_features]``.
        masks: int32 ``[num_frames]`` of each utterance; None: all frames are valid.
        strategy: "longest", "max_length" or "do_not_pad".
        max_length: Frames for `truncation` and "max_length".
        truncation: Whether to cut longer utterances to `max_length`.
        multiple: Lengths after cutting and padding are rounded up to a multiple of this.
        side: "right" or "left", where padding goes.
        value: Features of padded frames; their mask is 0.
    """
    rows = list(rows)
    if masks is None:
        masks = [torch.ones(len(row), dtype=torch.int32, device=row.device) for row in rows]
    masks = list(masks)
    if truncation and max_length is not None:
        limit = round_up(max_length, multiple)
        rows = [row[:limit] for row in rows]
        masks = [mask[:limit] for mask in masks]
    if strategy == "do_not_pad" or not rows:
        return rows, masks
    length = max_length if strategy == "max_length" else None
    wanted = round_up(max(map(len, rows)) if length is None else length, multiple)
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        missing = max(wanted - len(row), 0)
        before, after = (0, missing) if side == "right" else (missing, 0)
        rows[index] = F.pad(row, (0, 0, before, after), value=value)
        masks[index] = F.pad(mask, (before, after))
    return rows, masks


def stack_rows(
    output: Mapping[str, list[Tensor]],
    kind: str | None,
    *,
    ragged: Callable[[list[Any]], Any] | None,
) -> BatchFeature:
    """Stacks the rows of each entry.

    Args:
        output: Rows of each utterance by name.
        kind: "pt" for tensors, else NumPy arrays.
        ragged: What rows of different lengths are gathered with; None: they are refused.

    Raises:
        ValueError: The lengths differ and that is refused.
    """
    entries: dict[str, Any] = {}
    for name, rows in output.items():
        if len({row.shape for row in rows}) == 1:
            stacked = torch.stack(rows)
            entries[name] = stacked if kind == "pt" else stacked.cpu().numpy()
        elif ragged is not None or not rows:
            arrays = list(rows) if kind == "pt" else [row.cpu().numpy() for row in rows]
            entries[name] = (ragged or list)(arrays)
        else:
            lengths = sorted({len(row) for row in rows})
            raise ValueError(
                f"{name} has rows of different lengths ({lengths[0]} to {lengths[-1]} frames), "
                "which no tensor holds. Pad with padding=True, cut with truncation=True, or get a "
                "list with return_tensors=None"
            )
    return BatchFeature(entries)


def collect(given: Any, name: str, needed: str) -> dict[str, Any]:
    """A mapping of lists, from that or from a list of mappings with an utterance or text each.

    Args:
        given: what a collate function was given.
        name: of that argument, for messages.
        needed: the entry that it must hold.

    Raises:
        TypeError: it is neither.
        ValueError: it is empty, or the entry is missing.
    """
    if isinstance(given, Mapping):
        entries = dict(given)
    elif isinstance(given, list | tuple) and all(isinstance(item, Mapping) for item in given):
        if not given:
            raise ValueError(f"{name} must hold one example at least, got an empty list")
        entries = {key: [item[key] for item in given] for key in given[0]}
    else:
        raise TypeError(
            f"{name} must be a mapping or a list of mappings, got {type(given).__name__}"
        )
    if needed not in entries:
        raise ValueError(f"{name} must hold {needed}, got {sorted(entries)}")
    return entries


def check_sizes(entries: Mapping[str, Any], needed: str) -> None:
    """Raises ValueError where an entry has not as many rows as the one that is needed."""
    for key, value in entries.items():
        if value is not None and len(value) != len(entries[needed]):
            raise ValueError(f"{key} has {len(value)} entries, {needed} has {len(entries[needed])}")


def to_features(row: Any, index: int) -> Tensor:
    """The features of an utterance as a tensor ``[num_frames, num_features]``, at most float32.

    Raises:
        ValueError: They have another shape.
    """
    tensor = row if isinstance(row, Tensor) else torch.as_tensor(np.asarray(row), device="cpu")
    if tensor.dim() != 2:
        raise ValueError(
            f"input_features of utterance {index} must have shape [num_frames, num_features], got "
            f"{list(tensor.shape)}"
        )
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def to_mask(mask: Any, row: Tensor, index: int) -> Tensor:
    """The attention mask of an utterance as int32 ``[num_frames]``, on the device of its features.

    Raises:
        ValueError: It is not as long as the features.
    """
    tensor = mask if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask), device="cpu")
    if tensor.shape != row.shape[:1]:
        raise ValueError(
            f"attention_mask of utterance {index} must have shape [{row.shape[0]}] like its "
            f"features, got {list(tensor.shape)}"
        )
    return tensor.to(device=row.device, dtype=torch.int32)
