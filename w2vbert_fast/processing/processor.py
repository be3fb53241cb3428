"""Feature extractor and tokenizer of a checkpoint in one object."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from w2vbert_fast.checkpoints.hub import FilesMixin
from w2vbert_fast.checkpoints.keywords import TOKENIZERS
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.processing.batch import BatchFeature
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor
from w2vbert_fast.processing.tokenizer import Wav2Vec2CTCTokenizer
from w2vbert_fast.processing.tokenizer_files import VOCABULARY_FILE


class Wav2Vec2BertProcessor(FilesMixin):
    """Audio to features, transcripts to labels, and CTC paths to text.

    Names, arguments and file formats are those of `Wav2Vec2BertProcessor` in transformers. An
    argument that neither part knows is an error; the reference ignores it.

    Args:
        feature_extractor: Makes `input_features` of audio.
        tokenizer: Makes `labels` of text, and text of ids.

    Raises:
        TypeError: A part is something else.
    """

    _keywords = TOKENIZERS

    def __init__(
        self, feature_extractor: SeamlessM4TFeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer
    ) -> None:
        for name, part, kind, instead in (
            (
                "feature_extractor",
                feature_extractor,
                SeamlessM4TFeatureExtractor,
                "from_dict(feature_extractor.to_dict())",
            ),
            (
                "tokenizer",
                tokenizer,
                Wav2Vec2CTCTokenizer,
                "from_pretrained(folder) behind tokenizer.save_pretrained(folder)",
            ),
        ):
            if isinstance(part, kind):
                continue
            came = type(part)
            message = f"{name} must be a w2vbert_fast.{kind.__name__}, got "
            message += f"{came.__module__}.{came.__qualname__}"
            if any(base.__name__ == kind.__name__ for base in came.__mro__):
                message += f"; w2vbert_fast.{kind.__name__}.{instead} makes one of it"
            raise TypeError(message)
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(feature_extractor={self.feature_extractor!r}, "
            f"tokenizer={self.tokenizer!r})"
        )

    def __call__(
        self,
        audio: Any = None,
        text: Any = None,
        *,
        audio_kwargs: Mapping[str, Any] | None = None,
        text_kwargs: Mapping[str, Any] | None = None,
        common_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepares audio, transcripts or both.

        Args:
            audio: One or several utterances, as `SeamlessM4TFeatureExtractor` takes them.
            text: One or several texts, as `Wav2Vec2CTCTokenizer` takes them.
            audio_kwargs: Arguments for the feature extractor only.
            text_kwargs: Arguments for the tokenizer only.
            common_kwargs: Arguments for both, which the others override.
            **kwargs: Arguments of the feature extractor or the tokenizer. What both have
                (`padding`, `truncation`, `max_length`, `pad_to_multiple_of`, `return_tensors`,
                `return_attention_mask`) goes to both: lengths are in mel frames for audio and in
                tokens for text.

        Returns:
            Of audio `input_features` and `attention_mask`; of text `input_ids` and
            `attention_mask`; of both, the audio's entries and the text's ids as `labels`.

        Raises:
            TypeError: An argument is unknown to both, or an input is of the wrong type.
            ValueError: There is neither audio nor text, an argument was given twice, or a part
                refuses its input.
        """
        if audio is None and text is None:
            raise ValueError("audio or text is needed, got neither")
        for_audio, for_text = _route(
            kwargs, self.feature_extractor.__call__, self.tokenizer.__call__
        )
        for name, flat, own in (
            ("audio_kwargs", for_audio, audio_kwargs),
            ("text_kwargs", for_text, text_kwargs),
        ):
            twice = sorted(set(flat) & set(own or {}))
            if twice:
                raise ValueError(f"{', '.join(twice)} was given directly and in {name}")
            flat.update({**(common_kwargs or {}), **flat, **(own or {})})
        if audio is None:
            return self.tokenizer(text, **for_text)
        inputs = self.feature_extractor(audio, **for_audio)
        if text is not None:
            inputs["labels"] = self.tokenizer(text, **for_text)["input_ids"]
        return inputs

    def pad(self, input_features: Any = None, labels: Any = None, **kwargs: Any) -> BatchFeature:
        """Pads computed features, labels or both, as a collate function does.

        Args:
            input_features: What `SeamlessM4TFeatureExtractor.pad` takes.
            labels: What `Wav2Vec2CTCTokenizer.pad` takes: mappings with `input_ids`.
            **kwargs: Arguments of these methods; what both have goes to both.

        Returns:
            Of features `input_features` and `attention_mask`; of labels `input_ids` and
            `attention_mask`; of both, the features' entries and the padded ids as `labels`.

        Raises:
            TypeError: An argument is unknown to both.
            ValueError: There are neither features nor labels, or a part refuses its input.
        """
        if input_features is None and labels is None:
            raise ValueError("input_features or labels are needed, got neither")
        for_audio, for_text = _route(kwargs, self.feature_extractor.pad, self.tokenizer.pad)
        if input_features is None:
            return self.tokenizer.pad(labels, **for_text)
        batch = self.feature_extractor.pad(input_features, **for_audio)
        if labels is not None:
            batch["labels"] = self.tokenizer.pad(labels, **for_text)["input_ids"]
        return batch

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """`Wav2Vec2CTCTokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """`Wav2Vec2CTCTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """The names of what the model's `forward` takes."""
        return [*self.feature_extractor.model_input_names, "labels"]

    @classmethod
    def _from_repository(
        cls, repository: Repository, overrides: dict[str, Any]
    ) -> Wav2Vec2BertProcessor:
        """Overrides are for the extractor or else for the tokenizer; `padding_side` is for both."""
        if repository.find(VOCABULARY_FILE) is None:
            raise OSError(
                f"{repository.name} holds no tokenizer ({VOCABULARY_FILE}), as a checkpoint "
                "without a CTC head does; for features alone take SeamlessM4TFeatureExtractor"
            )
        of_extractor = set(SeamlessM4TFeatureExtractor().to_dict())
        for_audio = {name: value for name, value in overrides.items() if name in of_extractor}
        for_text = {
            name: value
            for name, value in overrides.items()
            if name not in of_extractor or name == "padding_side"
        }
        return cls(
            SeamlessM4TFeatureExtractor._from_repository(repository, for_audio),
            Wav2Vec2CTCTokenizer._from_repository(repository, for_text),
        )

    def _write_files(self, folder: Path) -> list[str]:
        """Those of both parts: the layout that all versions of transformers read."""
        paths: list[str] = []
        for part in (self.feature_extractor, self.tokenizer):
            named = copy.copy(part)
            named.processor_class = type(self).__name__
            paths += named.save_pretrained(folder)
        return paths


def _route(
    kwargs: Mapping[str, Any], first: Callable[..., Any], second: Callable[..., Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments for each of two functions.

    Raises:
        TypeError: Neither has an argument of that name.
    """
    of_first = set(inspect.signature(first).parameters)
    of_second = set(inspect.signature(second).parameters)
    unknown = sorted(set(kwargs) - of_first - of_second)
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: no argument of the feature extractor or the tokenizer"
        )
    return (
        {name: value for name, value in kwargs.items() if name in of_first},
        {name: value for name, value in kwargs.items() if name in of_second},
    )
