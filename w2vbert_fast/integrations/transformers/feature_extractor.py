"""Our features in a `SeamlessM4TFeatureExtractor` that transformers takes for its own."""

from __future__ import annotations

import functools
from typing import Any

import torch

from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

_ARGUMENTS = (
    "feature_size",
    "sampling_rate",
    "num_mel_bins",
    "padding_value",
    "stride",
    "padding_side",
    "return_attention_mask",
)


class _Fast:
    """transformers' `SeamlessM4TFeatureExtractor`, computed by `w2vbert_fast.processing.features`.

    An instance of transformers' class, for processors, pipelines and collators: the same
    arguments, attributes and files. It bears the name of transformers' class, by which
    `Wav2Vec2ProcessorWithLM` knows what it works with, and so do its files: `AutoProcessor` loads
    them anywhere, as transformers' own, and `from_pretrained` of this class, or `from_extractor`,
    makes them fast again.

    A waveform that the reference makes NaN or nothing of (fewer than 560 samples) is a
    `ValueError`; docs/use/differences.md has the other differences, under "Features".
    """

    _reference: type[Any]

    @classmethod
    def from_extractor(cls, extractor: Any) -> Any:
        """The fast form of an extractor, with the same settings.

        Args:
            extractor: a `SeamlessM4TFeatureExtractor` of transformers or of this package, or a
                processor that has one; it is not changed.

        Raises:
            TypeError: it is something else.
        """
        found = getattr(extractor, "feature_extractor", extractor)
        if not isinstance(found, (cls._reference, SeamlessM4TFeatureExtractor)):
            raise TypeError(
                f"extractor is {type(found).__module__}.{type(found).__qualname__}; it must be a "
                "SeamlessM4TFeatureExtractor of transformers or w2vbert_fast, or a processor that "
                "has one"
            )
        settings = found.to_dict()
        settings.pop("feature_extractor_type", None)
        return cls(**settings)

    def __call__(
        self,
        raw_speech: Any,
        padding: Any = True,
        pad_to_multiple_of: int | None = 2,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: Any = None,
        sampling_rate: int | None = None,
        return_attention_mask: bool | None = None,
        do_normalize_per_mel_bins: bool | None = True,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes features as `w2vbert_fast.SeamlessM4TFeatureExtractor.__call__` does.

        Args:
            raw_speech: One utterance or several; a batch is one computation.
            padding: A bool, a name or a `PaddingStrategy`.
            pad_to_multiple_of: In mel frames, before stacking, as are all lengths.
            max_length: Length for `truncation` and "max_length".
            truncation: Whether to cut longer utterances.
            return_tensors: "pt", "np", a `TensorType`, or None for NumPy arrays.
            sampling_rate: Samples per second of `raw_speech`, checked.
            return_attention_mask: None: as constructed.
            do_normalize_per_mel_bins: Whether to normalise each utterance.
            device: Where to compute; None: where `raw_speech` is.
            **kwargs: Ignored, as in transformers.

        Returns:
            transformers' `BatchFeature` with `input_features`, float32 `[batch, T, 160]`, and
            `attention_mask`, int32 `[batch, T]`.

        Raises:
            ValueError: see there.
            TypeError: see there.
        """
        from transformers import BatchFeature

        ours = SeamlessM4TFeatureExtractor(**{name: getattr(self, name) for name in _ARGUMENTS})
        batch = ours(
            raw_speech,
            padding=getattr(padding, "value", padding),
            pad_to_multiple_of=pad_to_multiple_of,
            max_length=max_length,
            truncation=truncation,
            return_tensors=getattr(return_tensors, "value", return_tensors),
            sampling_rate=sampling_rate,
            return_attention_mask=return_attention_mask,
            do_normalize_per_mel_bins=bool(do_normalize_per_mel_bins),
            device=device,
        )
        return BatchFeature(dict(batch))


@functools.cache
def fast_feature_extractor() -> Any:
    """The class, made when transformers is there to derive it from."""
    from transformers import SeamlessM4TFeatureExtractor as Reference

    attributes = {
        "__module__": __package__,
        "__qualname__": "FastSeamlessM4TFeatureExtractor",  # where pickles find it
        "__doc__": _Fast.__doc__,
        "_reference": Reference,
    }
    return type(Reference.__name__, (_Fast, Reference), attributes)
