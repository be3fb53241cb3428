"""Packed layout: the frames of all utterances end to end, and the maps to and from padding.

This is the only place that knows about padding. Inside the encoder every activation is
`[num_tokens, ...]`; an utterance `b` owns the rows `cu_seqlens[b] : cu_seqlens[b + 1]`.

A token is a frame of an utterance, mostly a valid one. The feature extractor stacks two mel frames;
where their number is odd, the last stack holds one of them and padding, and is masked. This *half
frame* is a token too, the last of its utterance, as the reference computes it: its input is zero,
no other frame attends to it or convolves over it, and all else is done to it as to any frame.
`seqused_k` says how many of an utterance's tokens are valid.

A *filled* layout has further tokens behind the last utterance, its own as its half frame is, so
that batches have few different numbers of tokens. Packing makes them, unpacking leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Where each utterance of a batch lies, in packed and in padded form.

    Attributes:
        cu_seqlens: int32 `[batch + 1]`, cumulative numbers of tokens, starting at 0.
        lengths: number of tokens of each utterance, a half frame included.
        padded_length: number of frames T of the padded form `[batch, T, ...]`.
        token_positions: int64 `[num_tokens]`, the row of each packed token in the flattened padded
            form `[batch * T, ...]`; `None` when every row is full, so that packing is a reshape.
        tile_map: the attention kernel's work list for these utterances, which an encoder makes once
            for all its layers (`ops.attention_tile_map`); `None` where there is none.
        is_right_padded: every utterance is known to begin at its row's first frame.
        seqused_k: int32 `[batch]`, number of valid frames of each utterance, its first tokens:
            those that are attended to and convolved over. `None` where all tokens are valid.
        used_lengths: `seqused_k` on the host, or `None`.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    padded_length: int
    token_positions: Tensor | None
    tile_map: Tensor | None = None
    is_right_padded: bool = False
    seqused_k: Tensor | None = None
    used_lengths: tuple[int, ...] | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: list[int] | tuple[int, ...],
        padded_length: int,
        device: torch.device | str,
        valid_lengths: list[int] | tuple[int, ...] | None = None,
    ) -> PackedBatch:
        """Layout of right-padded rows.

        Args:
            lengths: tokens of each utterance, each at most `padded_length`.
            padded_length: frames of the padded form.
            device: where the index tensors live.
            valid_lengths: valid frames of each utterance; `None`: all its tokens.
        """
        if valid_lengths is None and all(length == padded_length for length in lengths):
            starts = [row * padded_length for row in range(len(lengths) + 1)]
            cu_seqlens = torch.tensor(starts, dtype=torch.int32, device="cpu").to(device)
            return cls(cu_seqlens, tuple(lengths), padded_length, None, is_right_padded=True)
        frames = torch.arange(padded_length, device="cpu")
        limits = torch.tensor(lengths, dtype=torch.int64, device="cpu")
        is_token = frames[None, :] < limits[:, None]
        used = tuple(lengths if valid_lengths is None else valid_lengths)
        return cls._from_tokens(is_token, tuple(lengths), used, torch.device(device), True)

    @classmethod
    def from_attention_mask(
        cls,
        attention_mask: Tensor | None,
        batch_size: int,
        padded_length: int,
        device: torch.device,
        features: Tensor | None = None,
    ) -> PackedBatch:
        """Layout of a batch from the reference's `attention_mask`.

        Args:
            attention_mask: `[batch, T]`, non-zero where a frame is valid. The valid frames of an
                utterance must be contiguous (padding on the right, the left or both). `None`: all
                frames are valid.
            batch_size: number of rows of the padded form.
            padded_length: number of frames T of the padded form.
            device: where the index tensors live.
            features: `[batch, T, F]`, the stacked mel frames, by which `half_frames` knows the half
                frames. `None`: only that of a row by itself is known.

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
        valid, has_half = _on_the_host(attention_mask.detach(), features)
        if has_half is None and bool(valid.all()):
            return cls.from_lengths([padded_length] * batch_size, padded_length, device)
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
        used = tuple(lengths)
        rows = [] if has_half is None else has_half.nonzero().flatten().tolist()
        if rows:
            behind = valid.to(torch.int8).argmax(1) + valid.sum(1)
            valid[rows, behind[rows]] = True
            for row in rows:
                lengths[row] += 1
        return cls._from_tokens(valid, tuple(lengths), used, device, not in_front.any().item())

    @classmethod
    def _from_tokens(
        cls,
        is_token: Tensor,
        lengths: tuple[int, ...],
        used: tuple[int, ...],
        device: torch.device,
        is_right_padded: bool,
    ) -> PackedBatch:
        # On the CPU first, whatever the default device is: a copy to the device is one transfer.
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="cpu")
        cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int64, device="cpu").cumsum(0)
        padded_length = is_token.shape[1]
        full = all(length == padded_length for length in lengths)
        positions = None if full else is_token.flatten().nonzero().flatten().to(device)
        seqused_k = None
        if used != lengths:
            seqused_k = torch.tensor(used, dtype=torch.int32, device="cpu").to(device)
        return cls(
            cu_seqlens.to(device),
            lengths,
            padded_length,
            positions,
            is_right_padded=is_right_padded,
            seqused_k=seqused_k,
            used_lengths=None if seqused_k is None else used,
        )

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def valid_lengths(self) -> tuple[int, ...]:
        """Number of valid frames of each utterance: `lengths` without half frames."""
        return self.lengths if self.used_lengths is None else self.used_lengths

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest utterance, 0 for an empty batch."""
        return max(self.lengths) if self.lengths else 0

    def pack(self, padded: Tensor) -> Tensor:
        """`[batch, T, ...]` -> `[num_tokens, ...]`, the utterances' rows in order."""
        rows = padded.flatten(0, 1)
        if self.token_positions is not None:
            rows = rows.index_select(0, self.token_positions)
        missing = self.num_tokens - rows.shape[0]
        return rows if missing <= 0 else torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])

    def unpack(self, packed: Tensor) -> Tensor:
        """`[num_tokens, ...]`, or the rows of a filled layout of these utterances ->
        `[batch, T, ...]`; padded positions are zero."""
        shape = (self.batch_size, self.padded_length, *packed.shape[1:])
        if self.token_positions is None:
            return _first(packed, shape[0] * shape[1]).reshape(shape)
        packed = _first(packed, self.token_positions.shape[0])
        rows = packed.new_zeros(shape[0] * shape[1], *packed.shape[1:])
        return rows.index_copy(0, self.token_positions, packed).view(shape)

    def zero_half_frames(self, packed: Tensor) -> Tensor:
        """`[num_tokens, C]` with zeros in the half frames, as they enter the encoder."""
        if self.used_lengths is None:
            return packed
        return packed.index_fill(0, self._rows(valid=False), 0.0)

    def valid_part(self, packed: Tensor) -> tuple[Tensor, PackedBatch]:
        """The rows of the valid frames, `[number of them, ...]`, and their layout."""
        if self.used_lengths is None:
            return _first(packed, self.num_tokens), self
        device = self.cu_seqlens.device
        layout = self.from_lengths(self.used_lengths, max(self.used_lengths), device)
        return packed.index_select(0, self._rows(valid=True)), layout

    def filled(self, num_tokens: int) -> PackedBatch:
        """The same utterances in so many rows, at least their own; an empty batch stays empty.

        The further rows are tokens of the last utterance that are not valid. They attend to it.
        """
        more = num_tokens - self.num_tokens
        if more == 0 or self.num_tokens == 0:
            return self
        last = max(row for row, length in enumerate(self.lengths) if length > 0)
        ends = torch.arange(self.batch_size + 1, device=self.cu_seqlens.device) > last
        used = torch.tensor(self.valid_lengths, dtype=torch.int32, device="cpu")
        return replace(
            self,
            cu_seqlens=self.cu_seqlens + more * ends.to(torch.int32),
            lengths=(*self.lengths[:last], self.lengths[last] + more, *self.lengths[last + 1 :]),
            seqused_k=used.to(self.cu_seqlens.device),
            used_lengths=self.valid_lengths,
        )

    def _rows(self, *, valid: bool) -> Tensor:
        """The packed rows of the valid frames, or of the half frames: int64."""
        limits = torch.tensor((self.lengths, self.valid_lengths), device="cpu")
        ends = limits[0].cumsum(0)
        stops = ends - limits[0] + limits[1]
        rows = torch.arange(self.num_tokens, device="cpu")
        is_valid = rows < stops.repeat_interleave(limits[0])
        return (is_valid == valid).nonzero().flatten().to(self.cu_seqlens.device)

    def right_padded(self) -> PackedBatch:
        """The same utterances in a padded form as short as the longest of them."""
        if self.is_right_padded and self.padded_length == self.max_seqlen:
            return self
        return self.with_lengths(self.lengths, self.max_seqlen, self.valid_lengths)

    def with_lengths(
        self,
        lengths: list[int] | tuple[int, ...],
        padded_length: int,
        valid_lengths: list[int] | tuple[int, ...] | None = None,
    ) -> PackedBatch:
        """Layout of the same utterances after their frame counts changed (adapter, TDNN).

        `valid_lengths` as in `from_lengths`.
        """
        return self.from_lengths(lengths, padded_length, self.cu_seqlens.device, valid_lengths)


def _first(packed: Tensor, rows: int) -> Tensor:
    return packed if packed.shape[0] == rows else packed[:rows]


def half_frames(features: Tensor, valid: Tensor) -> Tensor:
    """Which rows end in a half frame: one more frame, real in its first half only.

    The first frame behind the valid ones is a half frame if its second half is one constant, as
    padding is (whatever the padding value), and its first half is not that constant throughout.
    In a row by itself the one frame behind the valid ones always is one, whatever it holds: the
    reference, called with the row, returns a value for it. There is none behind padding (the
    extractor pairs an odd mel frame with padding in front of it, and calls that valid), nor where
    no frame is valid.

    Args:
        features: `[batch, T, F]`, pairs of mel frames.
        valid: bool `[batch, T]`, the valid frames of a row contiguous.

    Returns:
        bool `[batch]`. No host waits for it, and it may be traced.
    """
    batch, frames, width = features.shape
    length = valid.sum(1)
    behind = valid.to(torch.uint8).argmax(1) + length
    rows = torch.arange(batch, device=features.device)
    frame = features[rows, behind.clamp(max=frames - 1)]  # [batch, F]
    padding = frame[:, -1:]
    middle = width // 2
    is_half = (frame[:, middle:] == padding).all(1) & (frame[:, :middle] != padding).any(1)
    # Not a comparison of the batch's size, which a traced graph would take for a constant.
    alone = torch.ones_like(length).sum() == 1
    is_half = is_half | (alone & (behind == frames - 1))
    return is_half & (behind < frames) & (length > 0)


def _on_the_host(attention_mask: Tensor, features: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The valid frames, bool `[batch, T]`, and the rows that end in a half frame, bool `[batch]` or
    `None`, on the CPU after one transfer at most."""
    valid = attention_mask != 0
    batch, frames = valid.shape
    if valid.device.type == "cpu" and bool(valid.all()):
        return valid, None
    if features is None or valid.numel() == 0:
        valid = valid.to("cpu")
        alone = batch == 1 and frames > 1
        return valid, valid[:, -2] & ~valid[:, -1] if alone else None
    valid = valid.to(features.device)
    table = torch.cat((valid, half_frames(features.detach(), valid)[:, None]), dim=1).to("cpu")
    return table[:, :-1], table[:, -1]


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The utterance of every packed token: int64 `[num_tokens]`."""
    lengths = cu_seqlens.diff().to(torch.int64)
    batch = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return batch.repeat_interleave(lengths, output_size=num_tokens)


def positions_in_sequence(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The frame index of every packed token within its utterance: int64 `[num_tokens]`."""
    starts = cu_seqlens.to(torch.int64)[sequence_ids(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts
