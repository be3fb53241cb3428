"""Recordings read with libsndfile: plain and losslessly packed samples, and Ogg."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Generator
from typing import Any

from w2vbert_fast._extras import require
from w2vbert_fast.recordings.audio_files import Block, Damaged, File, Source, Unreadable, read_at
from w2vbert_fast.recordings.ogg import read_pages

_BLOCK_FRAMES = 1 << 20
_SF_ERR_SYSTEM, _SF_ERR_MALFORMED_FILE = 2, 3


def open_sndfile(file: File, start: Callable[[int, int], int]) -> Source | None:
    """Open a file with libsndfile; None when the other reader should have it.

    Args:
        file: the file.
        start: the first sample that is wanted, of a sampling rate and the number of samples.

    Raises:
        Unreadable: the file is truncated or damaged.
        OSError: it cannot be read.
        ImportError: soundfile is not installed.
    """
    soundfile = require("soundfile", "audio")
    magic = read_at(file, 0, 4)
    # MP3: libsndfile guesses the length where none is stored, from the first frames, and reads no
    # further. Its decoder also writes to standard error.
    if magic[:3] == b"ID3" or (magic[:1] == b"\xff" and magic[1:2] >= b"\xe0"):
        return None
    if magic == b"OggS" and not read_pages(file).plain:
        return None
    # A descriptor rather than the object: it spares a Python call for each read.
    handle: Any = file.fileno() if isinstance(file, io.FileIO) else file
    try:
        sound = soundfile.SoundFile(handle, closefd=False)
    except soundfile.LibsndfileError as error:
        file.seek(0)
        if error.code == _SF_ERR_MALFORMED_FILE:
            raise Damaged(f"truncated or damaged: {error.error_string}") from error
        return None
    # MP3 within another format; and a FLAC stream of unknown length, which libsndfile reports as
    # the largest integer before it fails at the end.
    if sound.subtype.startswith("MPEG") or sound.frames >= 1 << 60:
        sound.close()
        file.seek(0)
        return None
    skipped = 0
    first = start(sound.samplerate, sound.frames)
    # A position behind the end is refused when the blocks are cut.
    if 0 < first < sound.frames and sound.seekable():
        with contextlib.suppress(soundfile.LibsndfileError):
            skipped = sound.seek(first)
    return Source(sound.samplerate, _blocks(sound, skipped, soundfile.LibsndfileError), skipped)


def _blocks(
    sound: Any, position: int, decode_error: type[Exception]
) -> Generator[Block, None, None]:
    """Blocks from a position on, at which the file stands already."""
    with sound:
        rate: int = sound.samplerate
        stated = sound.frames / rate
        frames = position
        while frames < sound.frames:
            try:
                samples = sound.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
            except decode_error as error:
                if getattr(error, "code", None) == _SF_ERR_SYSTEM:
                    raise Unreadable(f"cannot be read: {error}") from error
                raise Damaged(f"truncated or damaged: {error}", stated) from error
            if len(samples) == 0:
                raise Damaged(
                    f"truncated or damaged: {frames / rate:.2f} of "
                    f"{stated:.2f} seconds can be decoded",
                    stated,
                )
            frames += len(samples)
            yield Block(rate, samples.T)
