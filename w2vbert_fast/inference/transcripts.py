"""Speech to text in a line: recordings in, transcripts out, one after another."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

from w2vbert_fast.inference.ctc.known_text import Stretch
from w2vbert_fast.inference.ctc.timestamps import Word
from w2vbert_fast.inference.pipeline import DEMO_MODEL, Pipeline
from w2vbert_fast.inference.rows import as_row
from w2vbert_fast.inference.runner import Flow, Runner
from w2vbert_fast.inference.tasks.align import Align
from w2vbert_fast.inference.tasks.transcribe import (
    ChannelText,
    Transcribe,
    Transcription,
    difference_fields,
    word_fields,
)
from w2vbert_fast.recordings.audio import Salvaged


@dataclass(frozen=True)
class Transcript:
    """What came of one recording.

    Attributes:
        file: the file, as the caller named it; the name of an open file; else "item N", counted
            from 0.
        text: what was said; None when the recording failed.
        audio_seconds: its length in seconds; None when it could not be read.
        processing_seconds: time from opening the file to its text, in seconds; None when it failed.
        error: what is wrong with the recording, None when nothing is.
        words: the words with their times, where `timestamps` were asked for.
        louder_channel: the channel that was taken, from 0, because in the mean of all of them what
            is said cancels; None: the mean.
        channels: what was said on each channel, where each was transcribed by itself, or one of
            them alone.
        salvaged: what is wrong with a file of which was taken what decodes; None: nothing.
        unwritten: speech that a known transcript lacks; None: `text` is what the model hears.
        unsaid: places in `words` of those that are probably not said, of a known transcript.
    """

    file: str
    text: str | None = None
    audio_seconds: float | None = None
    processing_seconds: float | None = None
    error: str | None = None
    words: tuple[Word, ...] | None = None
    louder_channel: int | None = None
    channels: tuple[ChannelText, ...] | None = None
    salvaged: Salvaged | None = None
    unwritten: tuple[Stretch, ...] | None = None
    unsaid: tuple[int, ...] | None = None

    @property
    def audio(self) -> str:
        """`file`, as results of tasks call it."""
        return self.file

    @property
    def seconds(self) -> float | None:
        """`audio_seconds`, as results of tasks call it."""
        return self.audio_seconds

    @property
    def real_time_factor(self) -> float | None:
        """Processing seconds per second of audio (below 1: faster than it was spoken)."""
        if self.audio_seconds is None or self.processing_seconds is None:
            return None
        return self.processing_seconds / self.audio_seconds

    def to_json(self, characters: bool = False, *, indent: int | None = None) -> str:
        """The transcript as JSON that any UTF-8 file can hold.

        Args:
            characters: whether words have the times of their characters.
            indent: spaces of an indentation; None: one line.
        """
        content: dict[str, Any] = {"file": self.file}
        if self.error is not None:
            content["error"] = self.error
        else:
            assert self.audio_seconds is not None and self.real_time_factor is not None
            content["text"] = self.text
            content["seconds"] = round(self.audio_seconds, 4)
            content["real_time_factor"] = round(self.real_time_factor, 5)
            if self.louder_channel is not None:
                content["louder_channel"] = self.louder_channel
            if self.salvaged is not None:
                content.update(self.salvaged.fields())
            if self.channels is not None:
                content["channels"] = [channel._asdict() for channel in self.channels]
            if self.words is not None:
                content["words"] = [word_fields(word, characters) for word in self.words]
            content.update(difference_fields(self.unwritten, self.unsaid))
        text = json.dumps(content, ensure_ascii=False, indent=indent)
        try:
            text.encode()
        except UnicodeEncodeError:
            # A file name that is not UTF-8: escaped, Python and others read the same bytes back.
            text = json.dumps(content, indent=indent)
        return text


def transcribe(
    audio: Any,
    pipeline: Pipeline | str | os.PathLike[str] | None = None,
    *,
    flow: Flow | None = None,
    **options: Any,
) -> Generator[Transcript, None, None]:
    """Transcribe recordings, lazily and in order, as `Transcriber` does, but one at a time.

    A recording that cannot be read, or does not fit into memory, yields a transcript with `error`
    set, and the next one follows.

    Args:
        audio: one recording or an iterable of them. A recording is a path; an open binary file;
            the content of a file as bytes; samples at 16 kHz, an array or a tensor; or a pair of
            samples and their sampling rate. An iterable is read at most two recordings ahead, in
            another thread.
        pipeline: from `load_pipeline`; or the name of a model as that takes it, then loaded with
            its weights packed; None: the demo checkpoint.
        flow: how recordings are read and batched; None: each by itself.
        **options: of `Transcribe`: timestamps, max_seconds, beam, lm, hotwords, ...

    Yields:
        A transcript for every recording.

    Raises:
        TypeError: an item is no recording, or an option is unknown.
        ValueError: an option has an impossible value.
        ImportError: a package of the ``audio`` extra is needed and not installed.
    """
    if isinstance(pipeline, Pipeline):
        task = Transcribe.of_pipeline(pipeline, **options)
    else:
        task = Transcribe(DEMO_MODEL if pipeline is None else pipeline, **options)
    runner: Runner[Transcription] = Runner(task, flow or Flow(window_rows=1))
    return transcripts(runner, audio)


def align(
    audio: Any,
    text: str,
    pipeline: Pipeline | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Transcript:
    """Find when the words of a transcript are said in a recording (`ctc.known_text.align_text`).

    Args:
        audio: the recording, as `transcribe` takes it.
        text: its transcript, with capitals, digits and marks as it is written.
        pipeline: as `transcribe` takes it.
        **options: of `Align`: timestamps, max_seconds, channels, ...

    Returns:
        The transcript with `words`, `unwritten` and `unsaid`. What is wrong with the recording, or
        that the text does not fit into it, is its `error`.

    Raises:
        TypeError, ValueError, ImportError: as `transcribe`.
    """
    if isinstance(pipeline, Pipeline):
        task = Align.of_pipeline(pipeline, **options)
    else:
        task = Align(DEMO_MODEL if pipeline is None else pipeline, **options)
    row = replace(as_row(0, audio), columns={"text": text})
    runner: Runner[Transcription] = Runner(task, Flow(window_rows=1))
    (found,) = transcripts(runner, row)
    return found


def transcripts(runner: Runner[Transcription], audio: Any) -> Generator[Transcript, None, None]:
    """What a runner makes of recordings, each with the time that it took."""
    runner.batcher.prepare()
    start = time.perf_counter()
    for result in runner(audio):
        seconds = time.perf_counter() - start
        yield Transcript(
            result.audio,
            result.text,
            result.seconds,
            None if result.error is not None else seconds,
            result.error,
            result.words,
            result.louder_channel,
            result.channels,
            result.salvaged,
            result.unwritten,
            result.unsaid,
        )
        start = time.perf_counter()
