"""Recordings too long for one forward pass: overlapping chunks, merged at the CTC level.

The encoder sees each chunk alone, so memory is bounded by the longest chunk, not the recording.
What it makes of the frames near a chunk's cut lacks context on one side. Chunks therefore overlap,
and of the frames that two chunks share each side gives those that lie deep inside it. The seam
between them is put where both chunks see a blank and agree on the characters before and behind, so
that none is lost or doubled: in the longest such pause that is in reach. The log-probabilities of
the pieces end to end are those of one long utterance, for greedy decoding, beam search and
timestamps alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Chunks start at multiples of this: whole frames for adapters that shorten by 2, 4, 8 or 16.
_GRID_SECONDS = 0.32
# Of an overlap, the part next to either cut in which no seam is put.
_EDGE_SHARE = 0.25
# A silence this long lies between words, not within one.
_WORD_GAP_SECONDS = 0.3


@dataclass(frozen=True)
class Chunk:
    """A part of a recording that goes through the model alone. All numbers are samples.

    Attributes:
        start: its first sample.
        end: behind its last sample.
        keep_start: from where on it is responsible for the text: the middle of its overlap with the
            chunk before, or of a silence that neither has as a whole.
        keep_end: up to where: the next chunk's `keep_start`.
    """

    start: int
    end: int
    keep_start: int
    keep_end: int


def split(
    num_samples: int, max_seconds: float, overlap_seconds: float, sampling_rate: int = 16_000
) -> list[Chunk]:
    """Cut a recording into overlapping chunks of nearly equal length.

    Args:
        num_samples: length of the recording.
        max_seconds: the longest chunk. A recording up to this stays whole.
        overlap_seconds: how much two neighbours share. Two to four seconds are plenty.
        sampling_rate: samples per second.

    Returns:
        The chunks in order; their kept parts cover the recording without gap or overlap. None for
        an empty recording.

    Raises:
        ValueError: `num_samples` or `overlap_seconds` is negative, `sampling_rate` not positive, or
            `max_seconds` less than 0.32 s longer than `overlap_seconds`.
    """
    if num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    if not (overlap_seconds >= 0 and math.isfinite(overlap_seconds)):
        raise ValueError(f"overlap_seconds must not be negative, got {overlap_seconds}")
    grid = round(_GRID_SECONDS * sampling_rate)
    overlap = round(overlap_seconds * sampling_rate)
    if math.isnan(max_seconds) or max_seconds * sampling_rate < overlap + grid:
        raise ValueError(
            f"max_seconds must exceed overlap_seconds ({overlap_seconds}) by {_GRID_SECONDS} s "
            f"or more, got {max_seconds}"
        )
    if num_samples == 0:
        return []
    if num_samples <= max_seconds * sampling_rate:
        return [Chunk(0, num_samples, 0, num_samples)]
    longest_step = (int(max_seconds * sampling_rate) - overlap) // grid
    count = math.ceil((num_samples - overlap) / (longest_step * grid))
    step = math.ceil((num_samples - overlap) / (count * grid)) * grid
    # Rounding the step up to the grid may leave nothing new for the last chunks.
    starts = [start for start in range(0, num_samples, step) if start + overlap < num_samples]
    ends = [min(start + step + overlap, num_samples) for start in starts]
    if ends[-1] - starts[-1] < grid:
        # A chunk of a few samples has no features.
        starts[-1] -= grid
    return _chunks_between(starts, ends)


def _chunks_between(starts: Sequence[int], ends: Sequence[int]) -> list[Chunk]:
    """Chunks from their first samples and the ones behind their last; seams in mid-overlap."""
    seams = [(start + end) // 2 for start, end in zip(starts[1:], ends[:-1], strict=True)]
    kept = itertools.pairwise([starts[0], *seams, ends[-1]])
    return [Chunk(start, end, *keep) for start, end, keep in zip(starts, ends, kept, strict=True)]


def merge(
    log_probs: Iterable[Tensor],
    chunks: Sequence[Chunk],
    frame_seconds: float,
    *,
    blank: int | None = None,
    delimiter: int | None = None,
    unspaced: Collection[int] = (),
    sampling_rate: int = 16_000,
) -> Tensor:
    """Join the CTC outputs of the chunks of one recording.

    Args:
        log_probs: of each chunk, floating point ``[num_frames, vocab]``: its valid frames. An
            iterable is read one by one.
        chunks: as `split` or `split_at_silence` made them.
        frame_seconds: seconds from one frame to the next: `timestamps.frame_seconds(config)`.
        blank: id of the blank, the tokenizer's padding token; None: the token that is the best of
            most frames, as the blank is in speech.
        delimiter: id of the word delimiter, the tokenizer's `word_delimiter_token_id`. No chunk
            emits it next to a cut, since there is no word on the other side: where a seam lies in a
            silence of 0.3 s or more and no delimiter is at either end of that, one is put into its
            middle. None: the language has none.
        unspaced: ids of characters that no delimiter stands beside: those of scripts without
            spaces between words.
        sampling_rate: samples per second that the chunks count.

    Returns:
        ``[num_frames, vocab]``, dtype and device of the input. Frame `i` begins at
        `i * frame_seconds` in the recording.

    Raises:
        ValueError: there are no chunks or not as many outputs as chunks, an output has another
            shape or frames than its chunk can have, or `frame_seconds` is not positive.
    """
    pieces = list(log_probs)
    if not chunks or len(pieces) != len(chunks):
        raise ValueError(
            f"log_probs must hold one tensor for each chunk, got {len(pieces)} for "
            f"{len(chunks)} chunks"
        )
    if not frame_seconds > 0:
        raise ValueError(f"frame_seconds must be positive, got {frame_seconds}")
    frame = frame_seconds * sampling_rate
    for i, (piece, chunk) in enumerate(zip(pieces, chunks, strict=True)):
        most = math.ceil((chunk.end - chunk.start) / frame)
        if piece.dim() != 2 or piece.shape[1] != pieces[0].shape[-1] or len(piece) > most:
            raise ValueError(
                f"log_probs[{i}] must be [at most {most}, {pieces[0].shape[-1]}], "
                f"got shape {list(piece.shape)}"
            )
    best = [piece.argmax(-1).cpu() for piece in pieces]
    if blank is None:
        counts = torch.cat(best).bincount(minlength=1)
        blank = int(counts.argmax())
    firsts = [round(chunk.start / frame) for chunk in chunks]
    parts = []
    seams = []
    begin = origin = round(chunks[0].keep_start / frame)
    for i, piece in enumerate(pieces):
        end = firsts[i] + len(piece)
        if i + 1 < len(pieces):
            middle = round(chunks[i].keep_end / frame)
            end = max(begin, _seam(best[i], firsts[i], best[i + 1], firsts[i + 1], middle, blank))
            seams.append(end - origin)
        # Silence that no chunk has.
        missing = min(max(0, firsts[i] - begin), end - begin)
        parts.append(_certain(blank, missing, piece))
        begin += missing
        part = piece[max(0, begin - firsts[i]) : max(0, end - firsts[i])]
        parts.append(part)
        # The last window of a chunk needs samples behind it, so that a frame may be missing.
        short = end - begin - len(part)
        if short > 0:
            parts.append(_certain(blank, short, piece))
        begin = end
    merged = torch.cat(parts)
    if delimiter is not None:
        gap = math.ceil(_WORD_GAP_SECONDS / frame_seconds)
        for place in _silences(merged, seams, blank, {delimiter, *unspaced}, gap):
            merged[place] = _certain(delimiter, 1, merged)[0]
    return merged


def _silences(
    merged: Tensor, seams: Iterable[int], blank: int, excluded: Collection[int], shortest: int
) -> list[int]:
    """The middles of the silences around seams that separate words without a delimiter.

    Those of silences beside an `excluded` token are left out.
    """
    spoken = (merged.argmax(-1).cpu() != blank).nonzero()[:, 0]
    places = []
    for seam in seams:
        following = int(torch.searchsorted(spoken, seam))
        if not 0 < following < len(spoken):
            continue
        left, right = int(spoken[following - 1]), int(spoken[following])
        beside = (int(merged[left].argmax()), int(merged[right].argmax()))
        if right - left - 1 >= shortest and not any(token in excluded for token in beside):
            places.append((left + right) // 2)
    return places


def _seam(
    left: Tensor, left_first: int, right: Tensor, right_first: int, middle: int, blank: int
) -> int:
    """The first frame that is taken from the right chunk, counted in the recording.

    Args:
        left: int64 ``[frames]``, the best token of each frame of the left chunk.
        left_first: number of its first frame in the recording.
        right: the same of the right chunk.
        right_first: number of its first frame.
        middle: where to cut if nothing speaks for another place.
        blank: id of the blank.
    """
    shared = left_first + len(left) - right_first
    edge = math.ceil(shared * _EDGE_SHARE)
    if shared <= 2 * edge:
        return middle
    a, b = left[right_first - left_first :], right[:shared]
    inside = torch.zeros_like(a, dtype=torch.bool)
    inside[edge : shared - edge] = True
    silent = (a == blank) & (b == blank) & inside
    # By how many of its two neighbours, the characters before and behind, a frame is certain.
    agreed = (_last_spoken(a, blank) == _last_spoken(b, blank)).int()
    agreed += (_next_spoken(a, blank) == _next_spoken(b, blank)).int()
    near = middle - right_first
    for certain in (2, 1, 0):
        chosen = _middle_of_longest_run(silent & (agreed == certain), near)
        if chosen is not None:
            return right_first + chosen
    # Speech without a pause: where both agree on two tokens in a row, the path goes on.
    agree = (a == b) & inside
    places = (agree[1:] & agree[:-1]).nonzero()[:, 0] + 1
    if not len(places):
        return middle
    return right_first + int(places[(places - near).abs().argmin()])


def _last_spoken(tokens: Tensor, blank: int) -> Tensor:
    """For each frame the last token other than the blank before it, -1 where there is none."""
    frames = torch.arange(len(tokens), device=tokens.device)
    frames = torch.where(tokens != blank, frames, -1)
    last = torch.cat([frames.new_full((1,), -1), frames.cummax(0).values[:-1]])
    return torch.where(last >= 0, tokens[last], -1)


def _next_spoken(tokens: Tensor, blank: int) -> Tensor:
    """For each frame the next token other than the blank, from itself on; -1 for none."""
    spoken = torch.where(tokens != blank, tokens, -1).flip(0)
    frames = torch.arange(len(tokens), device=tokens.device)
    frames = torch.where(spoken >= 0, frames, -1).cummax(0).values
    return torch.where(frames >= 0, spoken[frames], -1).flip(0)


def _middle_of_longest_run(flags: Tensor, near: int) -> int | None:
    """The middle of the longest run of True; of the one closest to `near` among equals."""
    zero = flags.new_zeros(1, dtype=torch.int32)
    edges = torch.diff(flags.int(), prepend=zero, append=zero)
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    if not len(starts):
        return None
    runs = zip(starts.tolist(), ends.tolist(), strict=True)
    start, end = min(runs, key=lambda run: (run[0] - run[1], abs((run[0] + run[1]) // 2 - near)))
    middle: int = (start + end) // 2
    return middle


def _certain(token: int, frames: int, like: Tensor) -> Tensor:
    """Log-probabilities ``[frames, vocab]`` of a token that is certain."""
    certain = like.new_full((frames, like.shape[1]), -math.inf)
    certain[:, token] = 0.0
    return certain
