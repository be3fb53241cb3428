"""The tasks of fine-tuning, one class a head: what is learnt, from which column, how it is scored.

What a head computes (its loss, its decisions, what LoRA trains as a whole) is the model's, in
`models.heads`. This module takes the standard library until a task is at work, so that the command
line can name the tasks without loading PyTorch.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

from w2vbert_fast.recordings.manifest import transcript
from w2vbert_fast.training.scores import error_rates, separates_words

if TYPE_CHECKING:
    from torch import Tensor

    from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel

BACKGROUND = "none"
"""Class of the frames that no segment covers."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording that belongs to a class.

    Attributes:
        start: where it begins, in seconds from the recording's start.
        end: where it ends, likewise.
        label: name of the class.
    """

    start: float
    end: float
    label: str


class Task(abc.ABC):
    """What a model learns.

    A row's target is what its manifest says of it: a transcript, the name of a class, or segments.
    Labels are what the loss reads.

    Attributes:
        name: what `FinetuneConfig.task` calls it.
        head: name of the model's class, in `w2vbert_fast.models`.
        transcribes: transcripts are learnt, with a vocabulary; else there are classes.
        score: what chooses the best checkpoint, where nothing else is said.
        packages: packages of the extra ``train`` that scoring needs.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    transcribes: ClassVar[bool] = False
    score: ClassVar[str] = "accuracy"
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def model_class(self) -> type[Wav2Vec2BertPreTrainedModel]:
        """The model's class."""
        from w2vbert_fast import models

        found: type[Wav2Vec2BertPreTrainedModel] = getattr(models, self.head)
        return found

    @abc.abstractmethod
    def target(self, columns: Mapping[str, Any], begin: float, end: float, lower_case: bool) -> Any:
        """The target of a row.

        Args:
            columns: the row's.
            begin: where what is trained on begins in its recording, in seconds.
            end: where it ends.
            lower_case: lower the case of transcripts.

        Raises:
            ValueError: it is not there, or none.
        """

    def classes(self, targets: Iterable[Any]) -> list[str]:
        """The names of classes that targets hold, each as often as it occurs."""
        return list(targets)

    @abc.abstractmethod
    def labels(self, target: Any, ids: Mapping[str, int] | Any, middles: Tensor) -> Tensor:
        """Labels of an utterance, int64.

        Args:
            target: of its row; a transcript in the spelling of the vocabulary.
            ids: of the classes by name, or the tokenizer.
            middles: float64 `[frames]`, where the middle of each encoder frame lies in the
                recording, in seconds.

        Raises:
            ValueError: there are none.
        """

    @abc.abstractmethod
    def no_labels(self, frames: int) -> Tensor:
        """Labels of an utterance of so many frames that counts for nothing."""

    def problem(self, labels: Tensor, frames: int) -> str | None:
        """Why the loss of an utterance cannot be finite; None where nothing speaks against it.

        Args:
            labels: its labels.
            frames: output frames of the model.
        """
        return None

    @abc.abstractmethod
    def outcome(
        self, decided: Tensor, frames: int, labels: Tensor, text: str, tokenizer: Any
    ) -> dict[str, Any]:
        """What is scored of an utterance, as `predictions.jsonl` has it.

        Args:
            decided: int64, the best token or class of each frame `[T']`, or the best class `[]`.
            frames: how many of them are valid.
            labels: int64, as `labels` makes them, padded with numbers below 0.
            text: its transcript.
            tokenizer: for transcripts.
        """

    @abc.abstractmethod
    def scores(self, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The scores of outcomes by name, as fractions."""

    def chosen_score(self, metric: str, tokenizer: Any, transcripts: Iterable[str] | None) -> str:
        """Name of the score that chooses the best checkpoint.

        Args:
            metric: `FinetuneConfig.metric`.
            tokenizer: for transcripts.
            transcripts: of the data; None where they are not known beforehand.
        """
        return self.score


class Ctc(Task):
    """Speech recognition: the text of an utterance."""

    name = "ctc"
    head = "Wav2Vec2BertForCTC"
    transcribes = True
    score = "wer"
    packages = ("jiwer",)

    def target(self, columns: Mapping[str, Any], begin: float, end: float, lower_case: bool) -> str:
        return normalise_transcript(transcript(columns), lower_case)

    def labels(self, target: str, ids: Any, middles: Tensor) -> Tensor:
        import torch

        return torch.tensor(ids(target)["input_ids"], dtype=torch.int64)

    def no_labels(self, frames: int) -> Tensor:
        import torch

        return torch.zeros(0, dtype=torch.int64)

    def problem(self, labels: Tensor, frames: int) -> str | None:
        # A frame for each token, and a blank between equal neighbours.
        needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
        if needed <= frames:
            return None
        return f"its {len(labels)} tokens need {needed} frames, and there are {frames}"

    def outcome(
        self, decided: Tensor, frames: int, labels: Tensor, text: str, tokenizer: Any
    ) -> dict[str, Any]:
        ids = decided[:frames].tolist()
        return {"reference": text, "hypothesis": tokenizer.decode(ids).strip() if ids else ""}

    def scores(self, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return error_rates([(each["reference"], each["hypothesis"]) for each in outcomes])

    def chosen_score(self, metric: str, tokenizer: Any, transcripts: Iterable[str] | None) -> str:
        """As `metric` says; "auto": the word error rate where words are separated, by a token of
        the vocabulary and in the transcripts, else the character error rate.

        Where nothing separates words, the word error rate counts utterances with an error, and
        stays at 1 while a model learns.
        """
        if metric != "auto":
            return metric
        if tokenizer.word_delimiter_token not in tokenizer.encoder:
            return "cer"
        return "wer" if transcripts is None or separates_words(transcripts) else "cer"


class Classification(Task):
    """One class an utterance."""

    name = "classification"
    head = "Wav2Vec2BertForSequenceClassification"

    def target(self, columns: Mapping[str, Any], begin: float, end: float, lower_case: bool) -> Any:
        return _label(columns, "")

    def labels(self, target: Any, ids: Mapping[str, int], middles: Tensor) -> Tensor:
        import torch

        return torch.tensor(_id(ids, target))

    def no_labels(self, frames: int) -> Tensor:
        import torch

        return torch.tensor(0)

    def outcome(
        self, decided: Tensor, frames: int, labels: Tensor, text: str, tokenizer: Any
    ) -> dict[str, Any]:
        labels = labels.flatten()
        labelled = labels >= 0
        right = (decided.flatten()[: len(labels)] == labels) & labelled
        return {"correct": int(right.sum()), "decisions": int(labelled.sum())}

    def scores(self, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        decisions = sum(each["decisions"] for each in outcomes)
        return {"accuracy": sum(each["correct"] for each in outcomes) / max(1, decisions)}


class XVector(Classification):
    """Speakers: one class an utterance, told by the direction of its embedding."""

    name = "xvector"
    head = "Wav2Vec2BertForXVector"


class Frames(Classification):
    """One class a 20 ms frame."""

    name = "frames"
    head = "Wav2Vec2BertForAudioFrameClassification"

    def target(
        self, columns: Mapping[str, Any], begin: float, end: float, lower_case: bool
    ) -> tuple[Segment, ...]:
        return _segments(columns, begin, end)

    def classes(self, targets: Iterable[Any]) -> list[str]:
        return [*(segment.label for segments in targets for segment in segments), BACKGROUND]

    def labels(self, target: Any, ids: Mapping[str, int], middles: Tensor) -> Tensor:
        """The class at the middle of each frame, `[frames]`."""
        import torch

        labels = torch.full((len(middles),), _id(ids, BACKGROUND))
        for segment in target:
            inside = (middles >= segment.start) & (middles < segment.end)
            labels[inside] = _id(ids, segment.label)
        return labels

    def no_labels(self, frames: int) -> Tensor:
        import torch

        from w2vbert_fast.ops.ctc import IGNORED_LABEL

        return torch.full((frames,), IGNORED_LABEL)

    def problem(self, labels: Tensor, frames: int) -> str | None:
        return "no frame has a label" if bool((labels < 0).all()) else None


TASKS: dict[str, Task] = {
    task.name: task for task in (Ctc(), Classification(), Frames(), XVector())
}
"""The tasks by name."""


def normalise_transcript(text: str, lower_case: bool = False) -> str:
    """Runs of white space as one space, none at the ends; lower case on request."""
    text = " ".join(text.split())
    return text.lower() if lower_case else text


def utf8(text: str, what: str) -> str:
    """The text, unless it holds bytes that are none.

    Raises:
        ValueError: it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8: {text!r:.200}") from None
    return text


def _id(ids: Mapping[str, int], label: str) -> int:
    if label not in ids:
        raise ValueError(f"the training data has no class {label!r}")
    return ids[label]


def _label(columns: Mapping[str, Any], where: str) -> str:
    value = columns.get("label")
    if value is None:
        raise ValueError(f"{where}label is missing")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}label must be the name of a class, got {value!r:.200}")
    return utf8(str(value), f"{where}label")


def _segments(columns: Mapping[str, Any], begin: float, end: float) -> tuple[Segment, ...]:
    """Segments, by their starts; those of a part of a recording must reach into it."""
    value = columns.get("segments")
    if value is None:
        raise ValueError("segments is missing")
    if not isinstance(value, list):
        raise ValueError(f"segments must be a list, got a {type(value).__name__}")
    segments: list[Segment] = []
    for index, entry in enumerate(value):
        field = f"segments[{index}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{field} must be an object, got a {type(entry).__name__}")
        first, last = entry.get("start"), entry.get("end")
        if not (_is_number(first) and _is_number(last) and 0 <= first < last):
            given = f"start {first!r} and end {last!r}"
            raise ValueError(f"{field} must have seconds, 0 <= start < end, got {given}")
        segments.append(Segment(float(first), float(last), _label(entry, f"{field}: ")))
    ordered = sorted(segments, key=lambda segment: segment.start)
    for one, other in itertools.pairwise(ordered):
        if other.start < one.end:
            raise ValueError(f"segments from {one.start} s and from {other.start} s overlap")
    if 0 < begin < end and ordered and not any(s.start < end and s.end > begin for s in ordered):
        raise ValueError(
            f"no segment reaches into the part from {begin:g} to {end:g} s; their times count from "
            "the recording's start"
        )
    return tuple(ordered)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
