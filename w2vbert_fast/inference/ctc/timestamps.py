"""When each word and character was said, and how sure the model is of it, from CTC posteriors.

Two CTC paths (one token a frame) can be read. By default the best path: the most probable token of
every frame, whose text is that of greedy decoding. With a known `text`, the most probable path
among those that spell the text, found by Viterbi search (Kürzinger et al. 2020 and torchaudio's
`forced_align` use the same recursion). A character lasts from the first to the last frame of its
run on the path; a word from its first to its last character. Both paths are turned into characters
and words by the tokenizer, so the frames are those of `tokenizer.decode(path,
output_word_offsets=True)`.

A CTC model need not emit a character while it is spoken: most emit it later, and the causal
convolutions of Wav2Vec2-BERT allow for a lot. How much is a property of the checkpoint.
`measure_delay` measures it on recordings whose onset and offset the energy shows, and `delay` takes
it off.

Confidence is a posterior probability: see `Character` and `Word`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from w2vbert_fast.inference.ctc.alignment import align
from w2vbert_fast.inference.pipeline import Pipeline
from w2vbert_fast.models import Wav2Vec2BertForCTC
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.processing.processor import Wav2Vec2BertProcessor
from w2vbert_fast.processing.text import Offset
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer

_SAMPLING_RATE = 16_000
# How far the probabilities of a frame may sum to something else than 1: bfloat16 rounds by 0.4 %.
_SUM_TOLERANCE = 0.05

_SAMPLES = Path(__file__).resolve().parents[2] / "demo" / "samples"
# Speech is what lies between the first and the last 5 ms within 35 dB of the loudest.
_ENERGY_WINDOW = 80
_SPEECH_RANGE_DB = 35.0
# Put around the speech when a delay is measured: faint noise, since digital silence is a sound that
# no microphone makes.
_SILENCE_SECONDS = 0.5
_NOISE_LEVEL = 1e-4


@dataclass(frozen=True)
class Character:
    """A character with its place in the recording.

    Attributes:
        text: the character, or the token if the vocabulary holds longer ones.
        start: where its first frame begins, in seconds.
        end: where its last frame ends, in seconds.
        confidence: the mean posterior probability of its token over its frames, 0 to 1.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Word:
    """A word with its place in the recording.

    Attributes:
        text: the word.
        start: where its first character begins, in seconds.
        end: where its last character ends, in seconds.
        confidence: the product of its characters' confidences, 0 to 1: the probability that the
            model gives to all of the characters together, taken as independent.
        characters: its characters in order.
        channel: the channel that it was said on, its number or name, where each was transcribed by
            itself; None: there is one.
    """

    text: str
    start: float
    end: float
    confidence: float
    characters: list[Character]
    channel: int | str | None = None


@dataclass(frozen=True)
class Delay:
    """How much later than speech a model emits characters.

    Attributes:
        start: from the onset of a word to the first frame of its first character, in seconds.
        end: from the end of a word to the end of its last character's last frame, in seconds.
    """

    start: float = 0.0
    end: float = 0.0


def frame_seconds(config: Wav2Vec2BertConfig) -> float:
    """Seconds from one output frame of a model to the next, the adapter's strides included.

    Features are 100 a second, stacked in pairs: 0.02 s; an adapter layer of stride 2 doubles that.

    Args:
        config: of the model that made the frames.

    Returns:
        Seconds a frame.
    """
    return config.inputs_to_logits_ratio / _SAMPLING_RATE


def word_timestamps(
    log_probs: Tensor,
    tokenizer: Wav2Vec2CTCTokenizer,
    frame_seconds: float,
    offset: float = 0.0,
    *,
    text: str | None = None,
    delay: Delay | None = None,
) -> list[Word]:
    """The words of a CTC output, with times and confidences.

    Args:
        log_probs: floating point ``[num_frames, vocab]``, log-softmax of the valid frames of one
            utterance, on any device. Only the path and its probabilities leave it; with `text`, the
            columns of its characters.
        tokenizer: of the same checkpoint. Its padding token is the blank.
        frame_seconds: seconds from one frame to the next: `frame_seconds(model.config)`.
        offset: seconds that are added to all times: where the utterance begins in its recording.
        text: the transcript to align; None: the best path's. It must be spelt as the model spells,
            without characters that the vocabulary lacks.
        delay: of the model: `measure_delay`. Taken off the times of words; characters are moved in
            proportion. Words that would then overlap meet halfway, and none begins before `offset`.
            None: times are those of the frames.

    Returns:
        The words in order of time; none for an utterance without any.

    Raises:
        TypeError: `log_probs` is not a floating-point tensor.
        ValueError: it has another shape, or is not a log-softmax; the tokenizer has no padding
            token; `frame_seconds` is not positive; or `text` has characters that the vocabulary
            lacks, more of them than fit into the frames, or no probability at all.
    """
    blank = checked_blank(log_probs, tokenizer, frame_seconds, offset)
    if log_probs.shape[0] == 0 and not text:
        return []
    if text is None:
        best = log_probs.max(-1)
        ids: list[int] = best.indices.tolist()
        scores = best.values
    else:
        labels = _labels(text, tokenizer)
        path = torch.from_numpy(align(log_probs, labels, blank))
        scores = log_probs.gather(-1, path.to(log_probs.device)[:, None])[:, 0]
        ids = path.tolist()
    posteriors = scores.float().exp().clamp(max=1.0).cpu().numpy()
    decoded = tokenizer.decode(ids, output_char_offsets=True, output_word_offsets=True)
    lower = tokenizer.do_lower_case
    words: list[Word] = []
    characters = iter(decoded.char_offsets)
    for found in decoded.word_offsets:
        own = []
        for character in characters:
            if character["start_offset"] >= found["start_offset"]:
                own.append(_character(character, posteriors, frame_seconds, lower))
            if character["end_offset"] >= found["end_offset"]:
                break
        words.append(
            Word(
                text=found["word"].lower() if lower else found["word"],
                start=own[0].start,
                end=own[-1].end,
                confidence=math.prod(character.confidence for character in own),
                characters=own,
            )
        )
    return place_words(words, delay, frame_seconds, offset)


def place_words(
    words: list[Word], delay: Delay | None, shortest: float, offset: float
) -> list[Word]:
    """Words at the times at which they are said.

    Args:
        words: with the times of their frames, in seconds, in order.
        delay: of the model; None: times stay.
        shortest: a word lasts at least so many seconds.
        offset: seconds that are added to all times.
    """
    spans = [(word.start, word.end) for word in words]
    if delay is not None:
        spans = _without_delay(spans, delay, shortest)
    return [_moved(word, *span, offset) for word, span in zip(words, spans, strict=True)]


def _without_delay(
    spans: list[tuple[float, float]], delay: Delay, shortest: float
) -> list[tuple[float, float]]:
    """Starts and ends of words, less the delay, in order and at least `shortest` seconds long."""
    starts = [max(0.0, start - delay.start) for start, _ in spans]
    ends = [end - delay.end for _, end in spans]
    for i in range(len(spans) - 1):
        if ends[i] > starts[i + 1]:
            # The gap between the words' characters moves by the mean of both delays.
            ends[i] = starts[i + 1] = (ends[i] + starts[i + 1]) / 2
    moved = []
    last = 0.0
    for start, end in zip(starts, ends, strict=True):
        start = max(start, last)
        last = max(end, start + shortest)
        moved.append((start, last))
    return moved


def _moved(word: Word, start: float, end: float, offset: float) -> Word:
    """The word from `start` to `end`, its characters in proportion, `offset` seconds later."""
    scale = (end - start) / (word.end - word.start)

    def place(seconds: float) -> float:
        return offset + start + (seconds - word.start) * scale

    characters = [
        dataclasses.replace(c, start=place(c.start), end=place(c.end)) for c in word.characters
    ]
    return dataclasses.replace(
        word, start=characters[0].start, end=characters[-1].end, characters=characters
    )


def measure_delay(
    model: Wav2Vec2BertForCTC,
    processor: Wav2Vec2BertProcessor,
    recordings: Iterable[Tensor] | None = None,
) -> Delay:
    """The emission delay of a model, from the energy of a few recordings; no transcripts needed.

    Each recording is cut to its speech, the part from the first to the last 5 ms within 35 dB of
    the loudest, and put between half seconds of faint noise. What the best path makes of it should
    begin and end with the speech. The medians over the recordings are returned.

    Args:
        model: a CTC model in eval mode, on any device.
        processor: of its checkpoint.
        recordings: each float ``[num_samples]`` at the model's sampling rate, speech from a quiet
            room, such as single words; None: the five English samples that ship with the package
            (14 s), which need the ``audio`` extra. Ten or more of the language and the microphone
            at hand are better.

    Returns:
        The delay.

    Raises:
        ValueError: no recording gave a character; or one is silent, too short or not finite.
    """
    rate = processor.feature_extractor.sampling_rate
    if recordings is None:
        from w2vbert_fast.recordings.audio import load_audio

        paths = sorted(_SAMPLES.glob("*.flac"))
        recordings = [load_audio(path, sampling_rate=rate).samples for path in paths]
    pipeline = Pipeline(model, processor)
    starts, ends = [], []
    for waveform in recordings:
        speech, silence = _speech(waveform.detach().float().cpu()), int(_SILENCE_SECONDS * rate)
        padded = torch.nn.functional.pad(speech, (silence, silence))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(padded), generator=generator, device="cpu")
        padded = padded + _NOISE_LEVEL * noise
        logits, _ = pipeline.logits([padded])
        words = word_timestamps(
            logits[0].float().log_softmax(-1), processor.tokenizer, frame_seconds(model.config)
        )
        if words:
            starts.append(words[0].start - silence / rate)
            ends.append(words[-1].end - (silence + len(speech)) / rate)
    if not starts:
        raise ValueError("recordings gave no characters to measure a delay with")
    return Delay(statistics.median(starts), statistics.median(ends))


def _speech(waveform: Tensor) -> Tensor:
    """The part of a waveform ``[num_samples]`` from the first to the last loud 5 ms."""
    if waveform.dim() != 1 or len(waveform) < _ENERGY_WINDOW:
        raise ValueError(
            f"recordings must be [num_samples] with at least {_ENERGY_WINDOW} samples, "
            f"got shape {list(waveform.shape)}"
        )
    count = len(waveform) // _ENERGY_WINDOW
    energy = waveform[: count * _ENERGY_WINDOW].reshape(count, _ENERGY_WINDOW).square().mean(1)
    loudest = energy.max()
    if not 0 < float(loudest) < math.inf:
        raise ValueError("recordings must hold sound and only finite samples")
    loud = (energy > loudest * 10 ** (-_SPEECH_RANGE_DB / 10)).nonzero()[:, 0]
    return waveform[int(loud[0]) * _ENERGY_WINDOW : (int(loud[-1]) + 1) * _ENERGY_WINDOW]


def checked_blank(
    log_probs: Tensor, tokenizer: Wav2Vec2CTCTokenizer, frame_seconds: float, offset: float
) -> int:
    """The id of the blank, where the arguments are what `word_timestamps` takes."""
    check_log_probs(log_probs)
    if not (frame_seconds > 0 and math.isfinite(frame_seconds)):
        raise ValueError(f"frame_seconds must be positive and finite, got {frame_seconds}")
    if not math.isfinite(offset):
        raise ValueError(f"offset must be finite, got {offset}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no pad_token, which CTC needs as its blank")
    return tokenizer.pad_token_id


def check_log_probs(log_probs: Tensor) -> None:
    """Checks that a tensor is a log-softmax ``[num_frames, vocab]``; see `word_timestamps`."""
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        got = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
        raise TypeError(f"log_probs must be a floating-point tensor, got {got}")
    if log_probs.dim() != 2 or log_probs.shape[1] == 0:
        raise ValueError(
            f"log_probs must be [num_frames, vocab], got shape {list(log_probs.shape)}"
        )
    if log_probs.shape[0] == 0:
        return
    total = log_probs.float().logsumexp(-1).abs().max().item()
    if not total <= _SUM_TOLERANCE:
        raise ValueError(
            "log_probs must be a log-softmax, whose frames sum to a probability of 1; got a frame "
            f"that is off by a factor of exp({total:.3g})"
        )


def _labels(text: str, tokenizer: Wav2Vec2CTCTokenizer) -> list[int]:
    """The token ids of a transcript."""
    # White space beyond one delimiter between two words has no counterpart in speech.
    ids: list[int] = tokenizer(" ".join(text.split())).input_ids
    if tokenizer.unk_token_id in ids:
        known = tokenizer.get_vocab()
        cased = text.upper() if tokenizer.do_lower_case else text
        missing = sorted({c for c in cased if not c.isspace() and c not in known})
        raise ValueError(f"text has characters that the vocabulary lacks: {''.join(missing)!r}")
    return ids


def _character(
    found: Offset,
    posteriors: npt.NDArray[np.float32],
    frame_seconds: float,
    lower: bool,
) -> Character:
    start, end = found["start_offset"], found["end_offset"]
    return Character(
        text=found["char"].lower() if lower else found["char"],
        start=start * frame_seconds,
        end=end * frame_seconds,
        confidence=float(posteriors[start:end].mean()),
    )
