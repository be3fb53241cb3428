"""Signals that tests transcribe, and the files that hold them."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

SECONDS = 1.5


def speech_like(seconds: float, sampling_rate: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Syllables: a pitch that glides, its harmonics, and pauses; `[num_samples]`, below 0.5.

    The signal holds nothing above 3 kHz and is the same at every sampling rate.
    """
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    start = rng.uniform(0, 6)
    # The integral of a pitch of 140 + 40 sin(...) Hz.
    glide = 2 * np.pi * 0.7
    phase = 2 * np.pi * (140 * time - 40 / glide * np.cos(glide * time + start))
    signal = np.zeros_like(time)
    for harmonic in range(1, 16):
        formant = 1 + np.sin(2 * np.pi * rng.uniform(0.5, 3) * time + rng.uniform(0, 6))
        signal += formant / harmonic * np.sin(harmonic * phase)
    envelope = np.clip(np.sin(2 * np.pi * 1.6 * time) + 0.4, 0, 1)
    return (0.1 * envelope * signal).astype(np.float32)


def stereo(rate: int, seconds: float = SECONDS) -> np.ndarray:
    """Two different channels `[num_samples, 2]` whose average is the test signal."""
    signal = speech_like(seconds, rate)
    difference = 0.2 * np.sin(np.arange(signal.size) * 0.01, dtype=np.float32)
    return np.stack([signal + difference, signal - difference], axis=1)


def write_container(
    path: Path | io.BytesIO,
    codec: str,
    rate: int,
    seconds: float = SECONDS,
    container_format: str | None = None,
    options: dict[str, str] | None = None,
    layout: str = "stereo",
) -> None:
    """Encode `stereo(rate)`, once or more, with FFmpeg's libraries."""
    target = str(path) if isinstance(path, Path) else path
    channels = av.AudioLayout(layout).nb_channels
    samples = np.tile(stereo(rate, seconds).T, (channels // 2, 1))
    with av.open(target, "w", format=container_format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        stream.bit_rate = 192_000
        for start in range(0, samples.shape[1], 960):
            block = np.ascontiguousarray(samples[:, start : start + 960].T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
            frame.rate = rate
            frame.pts = start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def film(languages: list[str | None]) -> bytes:
    """A Matroska file with an audio track a language: 440 Hz, 880 Hz, ..."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = []
        for language in languages:
            stream = container.add_stream("flac", rate=16_000, layout="mono")
            if language is not None:
                stream.metadata["language"] = language
            streams.append(stream)
        for number, stream in enumerate(streams):
            time = np.arange(2 * 16_000) / 16_000
            tone = 0.5 * np.sin(2 * np.pi * 440 * (number + 1) * time)
            pcm = np.round(tone * 32_767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16_000, Fraction(1, 16_000), 0
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return file.getvalue()
