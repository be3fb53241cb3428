"""From many channels to one, and from any sampling rate to the model's.

The mean of all channels is what a model hears. Where one channel is the other with its polarity
reversed (a plug wired wrongly, a balanced line recorded as stereo), the mean is silence. That shows
in the second moments of the channels, which are gathered piece by piece while they are averaged;
the caller then reads the file again, its louder channel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from w2vbert_fast._extras import require
from w2vbert_fast.recordings.audio_files import Block, Samples, Unreadable

# Samples that are converted at once.
_STRETCH = 1 << 20
_PIECE_SECONDS = 0.25
_RATE = 8_000
# A mean over 4 ms is taken away: of 50 Hz a sixteenth is left, of 125 Hz a third.
_HUM_SAMPLES = 32
# Of N channels without anything in common the sum has the energy of all of them. Below this share
# of it they cancel.
_CANCELLED = 0.2
# A channel this much quieter than the loudest one adds nothing that is missed.
_QUIET = 0.1
# Two channels of which this share of the energy is common hold the same sound.
_SAME = 0.5
# A piece this much quieter than the loudest one is no speech.
_PAUSE = 1e-3
_SILENCE = 1e-9


class Channels:
    """What the channels of a recording have in common, piece by piece."""

    def __init__(self) -> None:
        self._moments: dict[int, list[npt.NDArray[np.float32]]] = {}

    def add(self, block: Block) -> None:
        """Take in samples, ``[channels, n]``."""
        channels = block.samples.shape[0]
        if channels < 2 or block.samples.shape[1] == 0:
            return
        # Moments are the same of every n-th sample.
        samples = _without_hum(block.samples[:, :: max(1, block.sampling_rate // _RATE)])
        found = self._moments.setdefault(channels, [])
        pieces = max(1, round(block.seconds / _PIECE_SECONDS))
        with np.errstate(invalid="ignore", over="ignore"):
            for piece in np.array_split(samples, pieces, axis=1):
                mean = piece.mean(axis=1)
                found.append(piece @ piece.T / piece.shape[1] - np.outer(mean, mean))

    def to_read_alone(self) -> int | None:
        """The channel that holds what the mean of all would lose; None: the mean is right.

        It is a matter of the whole recording: how much of it is lost with the mean, how much with
        a channel, because another one has sounds of its own there.
        """
        widest = max(self._moments, default=0)
        lost_by_mean = 0
        lost = np.zeros(widest, np.int64)
        energy = np.zeros(widest)
        loudest = max(
            (float(np.trace(one) / n) for n, all_ in self._moments.items() for one in all_),
            default=0.0,
        )
        for channels, found in self._moments.items():
            moments = np.stack(found).astype(np.float64)  # [pieces, channels, channels]
            own = np.diagonal(moments, axis1=1, axis2=2)  # [pieces, channels]
            total = own.sum(1)
            heard = total / channels > max(_SILENCE, _PAUSE * loudest)
            moments, own, total = moments[heard], own[heard], total[heard]
            by_mean = moments.sum((1, 2)) < _CANCELLED * total
            lost_by_mean += int(by_mean.sum())
            audible = own > _QUIET * own.max(1, keepdims=True, initial=0)
            common = moments**2 >= _SAME * own[:, :, None] * own[:, None, :]
            kept = (~audible[:, None, :] | common).all(2) & audible
            lost[:channels] += (~kept).sum(0)
            # Of blocks with fewer channels the mean is taken.
            lost[channels:] += int(by_mean.sum())
            energy[:channels] += own.sum(0)
        if lost_by_mean == 0 or lost.min() >= lost_by_mean:
            return None
        best = np.flatnonzero(lost == lost.min())
        # The first one, where they differ by rounding.
        return int(best[(energy[best] > 0.999 * energy[best].max()).argmax()])


def _without_hum(samples: Samples) -> Samples:
    """Samples without what is below speech: a cable's hum is the same on both of its wires, and
    would be all that is left of channels that cancel."""
    if samples.shape[1] <= _HUM_SAMPLES:
        return np.ascontiguousarray(samples)
    sums = np.cumsum(samples, axis=1, dtype=np.float64)
    half = _HUM_SAMPLES // 2
    means = (sums[:, _HUM_SAMPLES:] - sums[:, :-_HUM_SAMPLES]) / _HUM_SAMPLES
    found: Samples = (samples[:, half : half - _HUM_SAMPLES] - means).astype(np.float32)
    return found


Pick = Callable[[Block], Samples]
"""What is made of the channels of a block: samples ``[channels, num_samples]``."""


def mean(channels: Channels) -> Pick:
    """The mean of all channels; what they have in common is noted."""

    def pick(block: Block) -> Samples:
        channels.add(block)
        return _mono(block.samples, None)

    return pick


def louder(channel: int) -> Pick:
    """A channel, in blocks that have it; of others the mean."""
    return lambda block: _mono(block.samples, channel)


def one(channel: int) -> Pick:
    """A channel that all blocks must have."""

    def pick(block: Block) -> Samples:
        count = block.samples.shape[0]
        if channel >= count:
            has = f"{count} channel{'s' if count > 1 else ''}"
            raise Unreadable(f"has no channel {channel}: it has {has}, counted from 0")
        return _finite(block.samples[channel : channel + 1])

    return pick


def each() -> Pick:
    """All channels, of which there must be as many in all blocks."""
    counts: set[int] = set()

    def pick(block: Block) -> Samples:
        counts.add(block.samples.shape[0])
        if len(counts) > 1:
            raise Unreadable(
                f"has now {min(counts)}, now {max(counts)} channels, which cannot be told apart"
            )
        return _finite(block.samples)

    return pick


def convert(blocks: Iterable[Block], sampling_rate: int, pick: Pick) -> tuple[Samples, float]:
    """Make one channel, or several, of those of blocks, and convert their rate.

    Args:
        blocks: in order; rate and number of channels may change.
        sampling_rate: samples per second to return.
        pick: what is made of the channels.

    Returns:
        The samples ``[channels, num_samples]``, and the length of the blocks in seconds.

    Raises:
        Unreadable: there are NaN or infinite samples, or not the channels that are wanted.
        ImportError: the rate has to change and soxr is not installed.
    """
    parts: list[Samples] = []
    stream = None
    rate = frames = count = 0
    seconds = 0.0
    for block in blocks:
        if block.sampling_rate != rate:
            if stream is not None:
                parts.append(_last(stream, count))
            seconds += frames / rate if frames else 0.0
            rate, frames, stream = block.sampling_rate, 0, None
        frames += block.samples.shape[1]
        for start in range(0, block.samples.shape[1], _STRETCH):
            stretch = block.samples[:, start : start + _STRETCH]
            picked = pick(Block(rate, stretch))
            count = picked.shape[0]
            if rate != sampling_rate and stream is None:
                stream = require("soxr", "audio").ResampleStream(
                    rate, sampling_rate, count, dtype="float32", quality="HQ"
                )
            parts.append(picked if stream is None else stream.resample_chunk(picked.T).T)
    if stream is not None:
        parts.append(_last(stream, count))
    seconds += frames / rate if frames else 0.0
    if not parts:
        return np.zeros((1, 0), np.float32), seconds
    return np.concatenate(parts, axis=1), seconds


def _last(stream: Any, channels: int) -> Samples:
    """What a resampler still holds."""
    rest: Samples = stream.resample_chunk(np.zeros((0, channels), np.float32), last=True)
    return rest.T


def _mono(samples: Samples, channel: int | None) -> Samples:
    count = samples.shape[0]
    with np.errstate(invalid="ignore", over="ignore"):
        if count == 1 or (channel is not None and channel < count):
            first = (channel or 0) if count > 1 else 0
            return _finite(samples[first : first + 1])
        return _finite((np.full(count, 1 / count, np.float32) @ samples)[None])


def _finite(samples: Samples) -> Samples:
    if not np.isfinite(samples).all():
        raise Unreadable("holds NaN or infinite samples")
    return np.ascontiguousarray(samples)
