"""Packed layout: the valid frames of all utterances end to end, and the maps to and from padding.

This is the only place that knows about padding. Inside the encoder every activation is
`[num_tokens, ...]`; an utterance `b` owns the rows `cu_seqlens[b] : cu_seqlens[b + 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Where each utterance of a batch lies, in packed and in padded form.

    Attributes:
        cu_seqlens: int32 `[batch + 1]`, cumulative lengths in frames, starting at 0.
        lengths: number of frames of each utterance.
        padded_length: number of frames T of the padded form `[batch, T, ...]`.
        token_positions: int64 `[num_tokens]`, the row of each packed token in the flattened padded
            form `[batch * T, ...]`; `None` when every row is full, so that packing is a reshape.
        tile_map: the attention kernel's work list for these utterances, which an encoder makes once
            for all its layers (`ops.attention_tile_map`); `None` where there is none.
        is_right_padded: every utterance is known to begin at its row's first frame.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    padded_length: int
    token_positions: Tensor | None
    tile_map: Tensor | None = None
    is_right_padded: bool = False

    @classmethod
    def from_lengths(
        cls, lengths: list[int] | tuple[int, ...], padded_length: int, device: torch.device | str
    ) -> PackedBatch:
        """Layout of right-padded rows.

        Args:
            lengths: frames of each utterance, each at most `padded_length`.
            padded_length: frames of the padded form.
            device: where the index tensors live.
        """
        frames = torch.arange(padded_length, device="cpu")
        limits = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        valid = frames[None, :] < limits[:, None]
        return cls._from_valid(valid, tuple(lengths), torch.device(device), True)

    @classmethod
    def from_attention_mask(
        cls,
        attention_mask: Tensor | None,
        batch_size: int,
        padded_length: int,
        device: torch.device,
    ) -> PackedBatch:
        """Layout of a batch from the reference's `attention_mask`.

        Args:
            attention_mask: `[batch, T]`, non-zero where a frame is valid. The valid frames of an
                utterance must be contiguous (padding on the right, the left or both). `None`: all
                frames are valid.
            batch_size: number of rows of the padded form.
            padded_length: number of frames T of the padded form.
            device: where the index tensors live.

        Raises:
            ValueError: the mask has another shape, or holes between valid frames.
        """
        if attention_mask is None:
            return cls.from_lengths([padded_length] * batch_size, padded_length, device)
        if tuple(attention_mask.shape) != (batch_size, padded_length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; input_features needs "
                f"({batch_size}, {padded_length})"
            )
        # One transfer: everything below is bookkeeping on a small boolean table.
        valid = attention_mask.detach().to("cpu") != 0
        lengths = valid.sum(1).tolist()
        starts = valid.to(torch.int8).diff(
            dim=1, prepend=valid.new_zeros(batch_size, 1).to(torch.int8)
        )
        holes = ((starts == 1).sum(1) > 1).nonzero().flatten().tolist()
        if holes:
            raise ValueError(
                f"attention_mask marks invalid frames between valid ones in row(s) {holes}; "
                "the valid frames of an utterance must be contiguous"
            )
        in_front = valid[:, :1] != valid.any(1, keepdim=True)
        return cls._from_valid(valid, tuple(lengths), device, not in_front.any().item())

    @classmethod
    def _from_valid(
        cls,
        valid: Tensor,
        lengths: tuple[int, ...],
        device: torch.device,
        is_right_padded: bool,
    ) -> PackedBatch:
        # On the CPU first, whatever the default device is: a copy to the device is one transfer.
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cpu")
        cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64, device="cpu").cumsum(0)
        padded_length = valid.shape[1]
        full = all(length == padded_length for length in lengths)
        positions = None if full else valid.flatten().nonzero().flatten().to(device)
        return cls(
            cu_seqlens.to(device),
            lengths,
            padded_length,
            positions,
            is_right_padded=is_right_padded,
        )

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Frames of the longest utterance, 0 for an empty batch."""
        return max(self.lengths) if self.lengths else 0

    def pack(self, padded: Tensor) -> Tensor:
        """`[batch, T, ...]` -> `[num_tokens, ...]`, the valid rows in order."""
        rows = padded.flatten(0, 1)
        return rows if self.token_positions is None else rows.index_select(0, self.token_positions)

    def unpack(self, packed: Tensor) -> Tensor:
        """`[num_tokens, ...]` -> `[batch, T, ...]`; padded positions are zero."""
        shape = (self.batch_size, self.padded_length, *packed.shape[1:])
        if self.token_positions is None:
            return packed.reshape(shape)
        rows = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
        return rows.index_copy(0, self.token_positions, packed).view(shape)

    def right_padded(self) -> PackedBatch:
        """The same utterances in a padded form as short as the longest of them."""
        if self.is_right_padded and self.padded_length == self.max_seqlen:
            return self
        return self.from_lengths(self.lengths, self.max_seqlen, self.cu_seqlens.device)

    def with_lengths(self, lengths: list[int], padded_length: int) -> PackedBatch:
        """Layout of the same utterances after their frame counts changed (adapter, TDNN)."""
        return self.from_lengths(lengths, padded_length, self.cu_seqlens.device)


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The utterance of every packed token: int64 `[num_tokens]`."""
    lengths = cu_seqlens.diff().to(torch.int64)
    batch = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return batch.repeat_interleave(lengths, output_size=num_tokens)


def positions_in_sequence(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The frame index of every packed token within its utterance: int64 `[num_tokens]`."""
    starts = cu_seqlens.to(torch.int64)[sequence_ids(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts
