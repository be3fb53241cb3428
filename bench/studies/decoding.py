"""How fast recordings are read: `load_audio` on one thread, by file format.

python -m bench.studies.decoding [--out FILE] AUDIO...

The recordings named are joined to five minutes (repeated where they are shorter) and stored in
every format; each file is then read from the page cache to 16 kHz mono. docs/use/scaling.md uses
the numbers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from bench.machine import write_results
from w2vbert_fast.recordings.audio import SAMPLING_RATE, load_audio

SECONDS = 300
ROUNDS = 5


class Format(NamedTuple):
    """A way to store audio: name of the file, sampling rate, channels, libsndfile's names."""

    name: str
    rate: int
    channels: int
    container: str
    subtype: str | None


FORMATS = (
    Format("16 kHz mono, WAV, 16 bit", 16_000, 1, "WAV", "PCM_16"),
    Format("16 kHz mono, FLAC", 16_000, 1, "FLAC", "PCM_16"),
    Format("16 kHz mono, Opus", 16_000, 1, "OGG", "OPUS"),
    Format("16 kHz mono, MP3", 16_000, 1, "MP3", None),
    Format("48 kHz mono, Opus", 48_000, 1, "OGG", "OPUS"),
    Format("48 kHz stereo, WAV, 16 bit", 48_000, 2, "WAV", "PCM_16"),
    Format("48 kHz stereo, FLAC", 48_000, 2, "FLAC", "PCM_16"),
    Format("48 kHz stereo, MP3", 48_000, 2, "MP3", None),
)


def five_minutes(paths: list[Path]) -> npt.NDArray[np.float32]:
    """The recordings end to end, repeated to `SECONDS`: float32 `[num_samples]` at 16 kHz."""
    joined = np.concatenate([load_audio(path).samples.numpy() for path in paths])
    return np.resize(joined, SECONDS * SAMPLING_RATE)


def store(samples: npt.NDArray[np.float32], form: Format, path: Path) -> None:
    """Write samples at 16 kHz in a format; the second channel is a quieter copy."""
    if form.rate != SAMPLING_RATE:
        samples = soxr.resample(samples, SAMPLING_RATE, form.rate)
    if form.channels == 2:
        samples = np.stack([samples, 0.9 * samples], axis=1)
    soundfile.write(path, samples, form.rate, format=form.container, subtype=form.subtype)


def measure(paths: list[Path]) -> list[dict[str, Any]]:
    """Bytes an hour, and seconds of audio read in a second, of every format."""
    samples = five_minutes(paths)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.audio" for i in range(len(FORMATS))]
        for form, file in zip(FORMATS, files, strict=True):
            store(samples, form, file)
        times: list[list[float]] = [[] for _ in FORMATS]
        for round_number in range(ROUNDS + 1):
            for file, found in zip(files, times, strict=True):
                start = time.perf_counter()
                load_audio(file)
                if round_number > 0:
                    found.append(time.perf_counter() - start)
        return [
            {
                "format": form.name,
                "bytes_per_hour": round(file.stat().st_size * 3600 / SECONDS),
                "audio_seconds_per_second": SECONDS / statistics.median(found),
                "seconds": found,
            }
            for form, file, found in zip(FORMATS, files, times, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("audio", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON")
    arguments = parser.parse_args()
    rows = measure(arguments.audio)
    print(f"{'format':28} {'MB an hour':>10} {'kbit/s':>8} {'x real time':>12}")
    for row in rows:
        size = row["bytes_per_hour"]
        rate = row["audio_seconds_per_second"]
        print(f"{row['format']:28} {size / 1e6:10.1f} {size / 450e3:8.1f} {rate:12.0f}")
    if arguments.out is not None:
        write_results(arguments.out, rows=rows)


if __name__ == "__main__":
    main()
