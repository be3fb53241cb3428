"""From a row of a manifest to what a model reads: decoding, speed perturbation, features, labels.

Everything random about an utterance is drawn from the seed, the epoch and its index alone, so that
neither the number of worker processes nor a resumed run changes it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from w2vbert_fast._extras import require
from w2vbert_fast.ops.ctc import IGNORED_LABEL
from w2vbert_fast.ops.fbank import FRAME_SHIFT
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer
from w2vbert_fast.recordings.audio import AudioError, load_audio
from w2vbert_fast.training.manifest import Row
from w2vbert_fast.training.tasks import Task
from w2vbert_fast.training.vocabulary import Spelling

# A manifest's length of a recording may be rounded so much.
_ROUNDING_SECONDS = 1.0


class UtteranceError(ValueError):
    """An utterance that cannot be trained on or scored; it is named and skipped."""


@dataclass(frozen=True)
class Utterance:
    """What the model reads of one recording.

    Attributes:
        name: what messages call it.
        input_features: float32 `[frames, feature_dim]`, all valid.
        labels: int64; token ids `[num_tokens]` for "ctc", a class `[]` for "classification" and
            "xvector", a class for each frame `[frames]` for "frames" (-100 is ignored).
        text: the transcript, for "ctc".
    """

    name: str
    input_features: Tensor
    labels: Tensor
    text: str = ""


@runtime_checkable
class UtteranceSource(Protocol):
    """Training or evaluation data. `finetune` takes one instead of a manifest.

    An utterance must depend on its index and the epoch alone, or a resumed run differs from an
    uninterrupted one. Objects go to worker processes, so they have to be picklable where
    `num_workers` is above 0 and processes are spawned.
    """

    def __len__(self) -> int:
        """Number of utterances in an epoch."""
        ...

    def num_frames(self, index: int, epoch: int) -> int:
        """About how many encoder frames an utterance has. Called for every index: be quick."""
        ...

    def load(self, index: int, epoch: int) -> Utterance:
        """The utterance.

        Raises:
            UtteranceError: it cannot be used; the others go on without it.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when the data changes; a run refuses to go on with other data."""
        ...


class ManifestSource:
    """The recordings of a manifest, or the parts of them that its rows name.

    Args:
        rows: its rows.
        digest: digest of the file.
        task: decides what `labels` are.
        feature_extractor: of the model.
        tokenizer: for transcripts, which take the spelling of its vocabulary.
        label2id: ids of the classes, for the other tasks.
        speeds: playback speeds to draw from; `(1.0,)` for none.
        seed: where the draws come from.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        digest: str,
        task: Task,
        feature_extractor: SeamlessM4TFeatureExtractor,
        *,
        tokenizer: Wav2Vec2CTCTokenizer | None = None,
        label2id: Mapping[str, int] | None = None,
        speeds: Sequence[float] = (1.0,),
        seed: int = 0,
    ) -> None:
        self.rows = list(rows)
        self.digest = digest
        self.task = task
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.spelling = None if tokenizer is None else Spelling(tokenizer)
        self.label2id = dict(label2id or {})
        self.speeds = tuple(speeds)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        parts = any(row.offset > 0 or row.duration is not None for row in self.rows)
        return f"{self.digest}:{len(self.rows)}{':parts' if parts else ''}"

    def speed(self, index: int, epoch: int) -> float:
        """The playback speed of an utterance in an epoch."""
        if len(self.speeds) == 1:
            return self.speeds[0]
        return random.Random(f"speed {self.seed} {epoch} {index}").choice(self.speeds)

    def num_frames(self, index: int, epoch: int) -> int:
        seconds = self.rows[index].seconds / self.speed(index, epoch)
        return max(1, round(seconds * self._frames_per_second()))

    def load(self, index: int, epoch: int) -> Utterance:
        row = self.rows[index]
        rate = self.feature_extractor.sampling_rate
        speed = self.speed(index, epoch)
        try:
            audio = load_audio(
                row.audio, sampling_rate=rate, offset=row.offset, duration=row.duration
            )
        except AudioError as error:
            raise UtteranceError(error.reason) from error
        if row.stated is not None and audio.seconds > row.stated + _ROUNDING_SECONDS:
            raise UtteranceError(
                f"its duration is {row.stated:.1f} s by the manifest, and it is "
                f"{audio.seconds:.1f} s long; a part of a recording needs an offset, 0 at its start"
            )
        samples = audio.samples.numpy()
        text = "" if self.spelling is None else self.spelling(row.target)
        if not samples.any() and text:
            raise UtteranceError("the recording is silent and the transcript is not")
        if speed != 1.0:
            soxr = require("soxr", "audio")
            samples = soxr.resample(samples, rate * speed, rate).astype(np.float32)
        try:
            features = self.feature_extractor(
                samples, sampling_rate=rate, return_tensors="pt", pad_to_multiple_of=None
            )["input_features"][0]
            frames = torch.arange(features.shape[0], dtype=torch.float64)
            middles = row.offset + (frames + 0.5) * speed / self._frames_per_second()
            target, ids = (
                (row.target, self.label2id) if self.spelling is None else (text, self.tokenizer)
            )
            labels = self.task.labels(target, ids, middles)
        except ValueError as error:
            raise UtteranceError(str(error)) from error
        return Utterance(row.name, features, labels, text)

    def _frames_per_second(self) -> float:
        extractor = self.feature_extractor
        return extractor.sampling_rate / (FRAME_SHIFT * extractor.stride)


@dataclass(frozen=True)
class Skipped:
    """An utterance that was left out, and why."""

    name: str
    reason: str


@dataclass
class Batch:
    """Utterances for one forward pass, and those that could not be loaded.

    Attributes:
        indices: of the utterances, in their source.
        utterances: may be empty.
        skipped: what was left out.
    """

    indices: list[int]
    utterances: list[Utterance]
    skipped: list[Skipped]

    def without(self, dropped: Mapping[int, str]) -> Batch:
        """The batch without some of its utterances; `dropped` gives the reason by position."""
        kept = [i for i in range(len(self.utterances)) if i not in dropped]
        names = [Skipped(self.utterances[i].name, reason) for i, reason in dropped.items()]
        return Batch(
            [self.indices[i] for i in kept],
            [self.utterances[i] for i in kept],
            self.skipped + names,
        )


Loaded = tuple[int, Utterance | Skipped]
"""An index and what came of it."""


class EpochDataset(torch.utils.data.Dataset[Loaded]):
    """A source as a map of (index, epoch) to an utterance, or to the reason why there is none."""

    def __init__(self, source: UtteranceSource) -> None:
        self.source = source

    def __getitem__(self, key: tuple[int, int]) -> Loaded:
        index, epoch = key
        try:
            return index, self.source.load(index, epoch)
        except UtteranceError as error:
            name = f"utterance {index}"
            if isinstance(self.source, ManifestSource):
                name = self.source.rows[index].name
            return index, Skipped(name, str(error))


def to_batch(items: Sequence[Loaded]) -> Batch:
    """What a data loader has loaded, as a batch."""
    usable = [(index, item) for index, item in items if isinstance(item, Utterance)]
    return Batch(
        [index for index, _ in usable],
        [utterance for _, utterance in usable],
        [item for _, item in items if isinstance(item, Skipped)],
    )


def pad_batch(utterances: Sequence[Utterance], device: torch.device) -> dict[str, Any]:
    """Pad utterances to one length.

    Args:
        utterances: at least one.
        device: where the tensors go.

    Returns:
        `input_features` `[batch, T, feature_dim]`, `attention_mask` int64 `[batch, T]`, `labels`
        int64 `[batch]` or `[batch, U]`, padded with -100.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    features = [utterance.input_features for utterance in utterances]
    labels = [utterance.labels for utterance in utterances]
    mask = [torch.ones(len(f), dtype=torch.int64) for f in features]
    batch = {
        "input_features": pad(features, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": torch.stack(labels)
        if labels[0].dim() == 0
        else pad(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
