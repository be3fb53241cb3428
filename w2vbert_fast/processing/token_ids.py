"""Lists of token ids: where they come from, how long they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from w2vbert_fast.processing.batch import BatchFeature, ragged_array, tensor_type
from w2vbert_fast.processing.padding import (
    check_length_arguments,
    check_sizes,
    collect,
    padding_strategy,
    round_up,
)

NO_LIMIT = int(1e30)
"""The `model_max_length` that files hold when there is none."""

_TRUNCATIONS = {"longest_first": True, "only_first": True, "do_not_truncate": False}


def to_list(ids: Any) -> Any:
    """Ids as Python integers: an integer, or (nested) lists of them.

    Args:
        ids: An integer, an array, a tensor, or (nested) lists of those.

    Raises:
        TypeError: There is something else in it.
    """
    if isinstance(ids, int):
        return int(ids)
    if isinstance(ids, list | tuple):
        return [index if type(index) is int else to_list(index) for index in ids]
    if isinstance(ids, Tensor):
        if not ids.is_floating_point() and not ids.is_complex():
            return ids.tolist()
    elif isinstance(ids, np.ndarray | np.generic) and (ids.dtype.kind in "iu" or ids.size == 0):
        return ids.tolist()
    what = getattr(ids, "dtype", type(ids).__name__)
    raise TypeError(f"token ids must be integers, got {what}; of logits take the argmax first")


def is_id_list(text: Any) -> bool:
    """Whether `text` is a non-empty list of ids."""
    return isinstance(text, list | tuple) and len(text) > 0 and isinstance(text[0], int)


def wanted_lengths(
    padding: bool | str,
    truncation: bool | str | None,
    max_length: int | None,
    model_max_length: int,
    multiple: int | None,
) -> tuple[int | None, str, int | None]:
    """What the length arguments of a tokenizer mean.

    Args:
        padding: True, False, "longest", "max_length" or "do_not_pad".
        truncation: True, False or a strategy's name. None: whether a length is given and nothing is
            padded.
        max_length: The length; None: `model_max_length`, if there is one.
        model_max_length: The model's limit, `NO_LIMIT` for none.
        multiple: What padded lengths are a multiple of.

    Returns:
        The length for "max_length", the padding strategy, and the length to cut to or None.

    Raises:
        ValueError: An argument is impossible, or ids would be cut to a length that padding changes.
    """
    check_length_arguments(max_length, False, multiple)
    if truncation is None:
        truncation = max_length is not None and padding is False
    elif not isinstance(truncation, bool):
        if truncation not in _TRUNCATIONS:
            raise ValueError(
                f"truncation must be True, False or one of {tuple(_TRUNCATIONS)}, "
                f"got {truncation!r}"
            )
        truncation = _TRUNCATIONS[truncation]
    if max_length is None and model_max_length < NO_LIMIT:
        max_length = model_max_length
    strategy = padding_strategy(padding, max_length)
    cut = max_length if truncation else None
    if cut is not None and strategy != "do_not_pad" and round_up(cut, multiple) != cut:
        raise ValueError(
            f"max_length must be a multiple of pad_to_multiple_of ({multiple}) where ids are cut "
            f"and padded, got {cut}"
        )
    return max_length, strategy, cut


def truncate_ids(ids: list[int], length: int, side: str) -> list[int]:
    """Cuts ids to a length, at the end ("right") or at the start ("left")."""
    return ids[:length] if side == "right" else ids[max(len(ids) - length, 0) :]


def collect_ids(
    encoded: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[Any]], str | None, bool]:
    """The rows of what a collate function is given.

    Args:
        encoded: A mapping with `input_ids`, of one text or of several, or a list of mappings of one
            each; lists, arrays or tensors.

    Returns:
        The rows of each entry, as lists; the kind of the ids ("pt", "np" or None for lists); and
        whether they are of one text.

    Raises:
        TypeError: `encoded` is something else.
        ValueError: `input_ids` is missing, or entries have different batch sizes.
    """
    entries = collect(encoded, "encoded_inputs", "input_ids")
    ids = entries["input_ids"]
    first = ids[0] if isinstance(ids, list | tuple) and ids else ids
    kind = "pt" if isinstance(first, Tensor) else "np" if isinstance(first, np.ndarray) else None
    rows = {
        key: to_list(value) if key in ("input_ids", "attention_mask") else list(value)
        for key, value in entries.items()
    }
    is_single = is_id_list(rows["input_ids"])
    if is_single:
        return {key: [value] for key, value in rows.items()}, kind, True
    check_sizes(rows, "input_ids")
    return rows, kind, False


def pad_ids(
    entries: dict[str, list[Any]],
    *,
    strategy: str,
    length: int | None,
    multiple: int | None,
    side: str,
    pad_id: int | None,
    return_mask: bool,
    return_tensors: str | None,
    unwrap: bool,
) -> BatchFeature:
    """Pads `input_ids`, with the padding id, and `attention_mask`, with zeros.

    Args:
        entries: Rows by name; `input_ids` must be there.
        strategy: "longest", "max_length" (`length`) or "do_not_pad".
        length: The length for "max_length".
        multiple: Padded lengths are rounded up to a multiple of this.
        side: "right" or "left".
        pad_id: The padding id.
        return_mask: Whether to return `attention_mask`.
        return_tensors: "pt", "np" or None for lists.
        unwrap: Whether to return the only row instead of a batch of one.

    Raises:
        ValueError: There is no padding id, an attention mask is not as long as its ids, or rows of
            different lengths are to become a tensor.
    """
    kind = tensor_type(return_tensors)
    rows = entries["input_ids"]
    masks = entries.get("attention_mask") or [[1] * len(row) for row in rows]
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        if len(row) != len(mask):
            raise ValueError(
                f"attention_mask of text {index} has {len(mask)} entries, its input_ids {len(row)}"
            )
    if strategy != "do_not_pad" and rows:
        if pad_id is None:
            raise ValueError("padding needs a pad_token, and this tokenizer has none")
        wanted = length if strategy == "max_length" and length is not None else max(map(len, rows))
        wanted = round_up(wanted, multiple)
        rows = [_fill(row, wanted, pad_id, side) for row in rows]
        masks = [_fill(mask, wanted, 0, side) for mask in masks]
    output = {**entries, "input_ids": rows}
    output.pop("attention_mask", None)
    if return_mask:
        output["attention_mask"] = masks
    if unwrap:
        output = {key: value[0] for key, value in output.items()}
    if kind is None:
        return BatchFeature(output)
    arrays: dict[str, Any] = {
        key: _to_array(key, output.pop(key), kind)
        for key in ("input_ids", "attention_mask")
        if key in output
    }
    return BatchFeature({**arrays, **output}).convert_to_tensors(kind)


def _fill(row: list[int], length: int, value: int, side: str) -> list[int]:
    filling = [value] * (length - len(row))
    return row + filling if side == "right" else filling + row


def _to_array(name: str, rows: list[Any], kind: str) -> np.ndarray[Any, np.dtype[Any]]:
    lengths = {len(row) for row in rows if isinstance(row, list)}
    if len(lengths) > 1 and kind == "np":
        return ragged_array([np.asarray(row, dtype=np.int64) for row in rows])
    if len(lengths) > 1:
        raise ValueError(
            f"{name} has rows of different lengths ({min(lengths)} to {max(lengths)}), which no "
            "tensor holds. Pass padding=True, or return_tensors=None to get lists"
        )
    return np.asarray(rows, dtype=np.int64)
