"""Connectionist temporal classification (Graves et al. 2006): the loss and greedy decoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.layout import PackedBatch, positions_in_sequence, sequence_ids
from w2vbert_fast.ops.dispatch import runs_triton
from w2vbert_fast.ops.operation import operation

IGNORED_LABEL = -100


def ctc_loss(
    logits: Tensor,
    input_lengths: Tensor,
    labels: Tensor,
    *,
    blank: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Negative log-likelihood of the labels, from an fp32 log-softmax.

    Args:
        logits: `[batch, T, vocab]`.
        input_lengths: int64 `[batch]`, valid frames of each utterance.
        labels: int64 `[batch, U]`; -100 and the blank are ignored, wherever they stand.
        blank: id of the blank, the tokenizer's padding token.
        reduction: "mean" (each loss divided by its label count, then averaged), "sum" or "none".
        zero_infinity: count an utterance too short for its labels as 0.

    Returns:
        A scalar, or `[batch]` for "none"; fp32.
    """
    labels = labels.to(logits.device)
    wanted = (labels != IGNORED_LABEL) & (labels != blank)
    log_probabilities = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
    # cuDNN's CTC restricts lengths and the blank id; the native kernel has no such limits.
    with torch.backends.cudnn.flags(enabled=False):
        return F.ctc_loss(
            log_probabilities,
            labels.masked_select(wanted),
            input_lengths,
            wanted.sum(-1),
            blank=blank,
            reduction=reduction,
            zero_infinity=zero_infinity,
        )


def greedy_decode(logits: Tensor, lengths: Tensor, *, blank: int) -> list[list[int]]:
    """Best path: the argmax of every frame, repeats collapsed, blanks dropped.

    Only token ids leave the device. Where Triton kernels run, theirs finds them.

    Args:
        logits: `[batch, T, vocab]`.
        lengths: int64 `[batch]`, valid frames of each utterance.
        blank: id of the blank.

    Returns:
        The token ids of each utterance.
    """
    if logits.shape[-1] > 0 and runs_triton(logits):
        layout = PackedBatch.from_lengths(lengths.tolist(), logits.shape[1], logits.device)
        tokens, found = ctc_greedy(layout.pack(logits), layout.cu_seqlens, blank)
        by_utterance = torch.split(tokens.cpu(), list(layout.lengths))
        return [
            row[:count].tolist() for row, count in zip(by_utterance, found.tolist(), strict=True)
        ]
    ids = logits.argmax(-1)
    frames = torch.arange(ids.shape[1], device=ids.device)
    keep = (ids != blank) & (frames[None, :] < lengths.to(ids.device)[:, None])
    keep[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    counts = keep.sum(1).tolist()
    kept = ids[keep].tolist()
    rows: list[list[int]] = []
    start = 0
    for count in counts:
        rows.append(kept[start : start + count])
        start += count
    return rows


def ctc_greedy(logits: Tensor, cu_seqlens: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Best path over packed frames, without leaving the device: `torch.ops.w2vbert.ctc_greedy`.

    Args:
        logits: `[num_frames, vocab]`, the frames of all utterances end to end.
        cu_seqlens: int32 `[batch + 1]`.
        blank: id of the blank.

    Returns:
        int32 `[num_frames]`: the tokens of utterance `i` from `cu_seqlens[i]` on, then -1 up to its
        last frame; and int32 `[batch]`: how many tokens those are.
    """
    return _ctc_greedy_op(logits, cu_seqlens, blank)


def _plain(logits: Tensor, cu_seqlens: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    num_frames = logits.shape[0]
    ids = logits.argmax(-1)
    first = positions_in_sequence(cu_seqlens, num_frames) == 0
    utterance = sequence_ids(cu_seqlens, num_frames)
    keep = (ids != blank) & (first | (ids != ids.roll(1)))
    counts = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.int64, device=logits.device)
    counts.index_add_(0, utterance, keep.to(torch.int64))
    # The rank of a kept frame among those of its utterance is its place behind the offset.
    rank = keep.cumsum(0) - 1 - (counts.cumsum(0) - counts)[utterance]
    places = (cu_seqlens.to(torch.int64)[utterance] + rank)[keep]
    tokens = torch.full((num_frames,), -1, dtype=torch.int32, device=logits.device)
    tokens[places] = ids[keep].to(torch.int32)
    return tokens, counts.to(torch.int32)


def _fake(logits: Tensor, cu_seqlens: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    counts = logits.new_empty(cu_seqlens.numel() - 1, dtype=torch.int32)
    return logits.new_empty(logits.shape[0], dtype=torch.int32), counts


_ctc_greedy_op = operation(
    "ctc_greedy(Tensor logits, Tensor cu_seqlens, SymInt blank) -> (Tensor tokens, Tensor counts)",
    _plain,
    fake=_fake,
    triton="csrc_triton.ctc:ctc_greedy",
)
