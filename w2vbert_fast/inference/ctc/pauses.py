"""Long recordings in chunks around their own quietest places, wherever the recording begins.

A model's answer at a frame depends on everything in the frame's chunk: by attention, and because
features are normalised over the chunk. A chunk that begins elsewhere has other words where the
model is unsure. Here the places of the cuts follow from the sound near them alone, so that an hour
and its two halves have the same chunks, but for those next to where the halves meet.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from w2vbert_fast.inference.ctc.chunks import Chunk, split

_FRAMES_PER_SECOND = 200
# Cuts are put where so much is quiet.
_PAUSE_SECONDS = 0.3
# Frames that are looked at together: a minute at 16 kHz in float64 are 8 MB.
_BLOCK_FRAMES = 12_000
_MOST_STEPS = 8
# Samples below this (-48 dB) are silence. Of one that is longer than both margins, a chunk keeps
# the margin only.
_SILENT = 2.0**-8
_MARGIN_SECONDS = 0.5


def split_at_pauses(
    samples: Tensor, max_seconds: float, overlap_seconds: float, sampling_rate: int = 16_000
) -> list[Chunk]:
    """Cut a recording into overlapping chunks around its own quietest places.

    Where a cut lies depends on the sound near it, not on where the recording begins: the parts of a
    recording are cut as the whole is, except next to their ends, and so have the same words. Where
    pauses are equally quiet to about a percent, another one may be chosen.

    A cut in a silence (-48 dB) of a second or more has no overlap: of such a silence both chunks
    keep half a second, as they do at the ends of a recording, wherever in it that begins or ends.

    Args:
        samples: floating point ``[num_samples]`` on the CPU.
        max_seconds: the longest chunk. A recording up to this stays whole.
        overlap_seconds: how much two neighbours share where there is no silence.
        sampling_rate: samples per second.

    Returns:
        The chunks in order; their kept parts cover the recording without gap or overlap. A chunk
        may begin behind its `keep_start` and end before its `keep_end`: in silence.

    Raises:
        ValueError: as `split` raises it, or `samples` has another shape.
    """
    if samples.dim() != 1:
        raise ValueError(f"samples must be [num_samples], got shape {list(samples.shape)}")
    num_samples = len(samples)
    evenly = split(num_samples, max_seconds, overlap_seconds, sampling_rate)
    if len(evenly) <= 1:
        return evenly
    frame = max(1, sampling_rate // _FRAMES_PER_SECOND)
    half = round(overlap_seconds * sampling_rate) // 2
    margin = round(min(_MARGIN_SECONDS, max_seconds / 8) * sampling_rate)
    step = int(max_seconds * sampling_rate) - 2 * max(half, margin)
    cuts = _pauses(samples, step, frame, round(_PAUSE_SECONDS * sampling_rate))
    edges = [0, *cuts, num_samples]
    heard = [_heard(samples, a, b) for a, b in itertools.pairwise(edges)]
    # Of every cut: where the chunk before it ends, the text changes hands, and the next one begins.
    places = [(0, 0, max(0, heard[0][0] - margin) if heard[0] else 0)]
    for cut, (before, after) in zip(cuts, itertools.pairwise(heard), strict=True):
        if before and after and after[0] - before[1] >= 2 * margin:
            places.append((before[1] + margin, (before[1] + after[0]) // 2, after[0] - margin))
        else:
            places.append((min(num_samples, cut + half), cut, max(0, cut - half)))
    last = min(num_samples, heard[-1][1] + margin) if heard[-1] else num_samples
    places.append((last, num_samples, num_samples))
    return [
        Chunk(start, end, kept, until)
        for (_, kept, start), (end, until, _) in itertools.pairwise(places)
    ]


def _heard(samples: Tensor, start: int, end: int) -> tuple[int, int] | None:
    """The first sample of a part that is not silent and the one behind the last; None without."""
    loud = (samples[start:end].abs() >= _SILENT).nonzero()[:, 0]
    return (start + int(loud[0]), start + int(loud[-1]) + 1) if len(loud) else None


def _pauses(samples: Tensor, step: int, frame: int, width: int) -> list[int]:
    """Places at most `step` samples apart: the quietest near them, over `width` samples."""
    num_samples = len(samples)
    levels = _levels(samples, frame, width)
    radius = step // frame // 2
    cuts: list[int] = []
    while True:
        edges = [0, *cuts, num_samples]
        long = [(a, b) for a, b in itertools.pairwise(edges) if b - a > step]
        if not long:
            return cuts
        if radius * frame < width:
            break
        found = [_quietest(samples, n * frame, width) for n in _minima(levels, radius)]
        # Not so near to another that hardly anything would be between them.
        apart = min(radius * frame, step) // 2
        last = -apart
        for place in found:
            here = next(((a, b) for a, b in long if a + apart <= place <= b - apart), None)
            if here is not None and place - max(here[0], last) >= apart:
                cuts.append(place)
                last = place
        cuts.sort()
        radius //= 2
    # No place is quieter than others.
    for a, b in long:
        pieces = -(-(b - a) // step)
        cuts += [a + (b - a) * i // pieces for i in range(1, pieces)]
    return sorted(cuts)


def _levels(samples: Tensor, frame: int, width: int) -> Tensor:
    """How loud the `width` samples around each frame are; of equal pauses, the longer is quieter.

    Float64 ``[num_frames]``.
    """
    count = len(samples) // frame
    blocks = torch.split(samples[: count * frame], frame * _BLOCK_FRAMES)
    loud = torch.cat([block.double().abs().view(-1, frame).sum(1) for block in blocks])
    sums = torch.nn.functional.pad(loud.cumsum(0), (1, 0))
    frames = torch.arange(count, device=sums.device)

    def around(reach: int) -> Tensor:
        return sums[(frames + reach).clamp(max=count)] - sums[(frames - reach).clamp(min=0)]

    near = max(1, width // frame // 2)
    return around(near) + around(8 * near) / 64


def _minima(levels: Tensor, radius: int) -> list[int]:
    """Frames that are the quietest within `radius` frames; of equal ones the first."""
    # The least of every `size` frames in a row: of what is left of a block and of the next one.
    size = 2 * radius + 1
    blocks = -(-(len(levels) + 2 * radius) // size)
    padded = levels.new_full((blocks * size,), math.inf)
    padded[radius : radius + len(levels)] = levels
    table = padded.view(blocks, size)
    until = table.cummin(1).values.view(-1)
    onwards = table.flip(1).cummin(1).values.flip(1).reshape(-1)
    lowest = torch.minimum(onwards[: len(levels)], until[size - 1 :][: len(levels)])
    kept: list[int] = []
    for place in (levels <= lowest).nonzero()[:, 0].tolist():
        if not kept or place - kept[-1] > radius:
            kept.append(place)
    return kept


def _quietest(samples: Tensor, near: int, width: int) -> int:
    """A place close to `near` around which `width` samples are quieter than around its neighbours.

    Counted in whole numbers, and searched until nothing within half of `width` is quieter: the same
    place is found from any place near it, whatever lies in front of the recording.
    """
    half = width // 2
    for _ in range(_MOST_STEPS):
        first = max(0, near - width)
        part = (samples[first : near + width].abs() * 32768.0).round().to(torch.int64)
        sums = torch.nn.functional.pad(part.cumsum(0), (1, 0))
        if len(sums) <= width:
            return near
        found = first + int((sums[width:] - sums[:-width]).argmin()) + half
        if found == near:
            break
        near = found
    return near
