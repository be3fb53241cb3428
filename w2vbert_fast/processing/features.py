"""Log-mel filterbank features, the model's input."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from w2vbert_fast.checkpoints.files import make_folder, read_json, to_json_string, write_json
from w2vbert_fast.checkpoints.hub import FilesMixin
from w2vbert_fast.checkpoints.repository import Repository
from w2vbert_fast.ops.fbank import (
    FRAME_LENGTH,
    FRAME_SHIFT,
    SAMPLE_SCALE,
    log_mel_filterbank,
    mel_filters,
    normalize_and_stack,
    scaled_window,
)
from w2vbert_fast.processing.batch import BatchFeature, ragged_array, tensor_type
from w2vbert_fast.processing.padding import (
    check_length_arguments,
    check_sizes,
    collect,
    pad_rows,
    padding_strategy,
    stack_rows,
    to_features,
    to_mask,
)
from w2vbert_fast.recordings.waveforms import (
    check_amplitudes,
    device_of,
    split_utterances,
    to_waveform,
)

logger = logging.getLogger(__name__)

FEATURE_EXTRACTOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"


class SeamlessM4TFeatureExtractor(FilesMixin):
    """Turns waveforms into normalised log-mel features, stacked in pairs.

    Frames of 400 samples every 160 become `num_mel_bins` log energies each (`ops.fbank` states the
    recipe); every utterance is normalised to zero mean and unit variance per mel bin; utterances
    are padded to one length; and `stride` successive frames are stacked into one. With the defaults
    a second of audio at 16 kHz becomes 49 frames of 160 features.

    The computation runs in torch, over all utterances of a call together, on any device. Names,
    arguments and file format are those of `SeamlessM4TFeatureExtractor` in transformers.

    Args:
        feature_size: Features per frame before stacking. Kept in the file; `num_mel_bins` decides.
        sampling_rate: Samples per second of the audio that the model was trained on.
        num_mel_bins: Number of mel bins.
        padding_value: Value of the features in padded frames.
        stride: Number of successive frames stacked into one.
        padding_side: "right" or "left".
        return_attention_mask: Whether calls return `attention_mask` unless they say otherwise.
        use_fast_kernels: Whether to use the device's fast implementation of the operations, also
            settable as an attribute; not saved. There is one on CUDA and ROCm devices where Triton
            is installed. Its results differ from the plain ones by rounding (float64 throughout).
        **kwargs: Further entries of a `preprocessor_config.json`; kept as attributes and saved.

    Raises:
        ValueError: An argument has an impossible value.
    """

    _shared_files = (PROCESSOR_FILE,)

    model_input_names: ClassVar[list[str]] = ["input_features", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16000,
        num_mel_bins: int = 80,
        padding_value: float = 0.0,
        stride: int = 2,
        *,
        padding_side: str = "right",
        return_attention_mask: bool = True,
        use_fast_kernels: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value, lowest in (
            ("feature_size", feature_size, 1),
            ("sampling_rate", sampling_rate, 100),
            ("num_mel_bins", num_mel_bins, 1),
            ("stride", stride, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        if isinstance(padding_value, bool) or not isinstance(padding_value, int | float):
            raise ValueError(f"padding_value must be a number, got {padding_value!r}")
        kind = kwargs.pop("feature_extractor_type", type(self).__name__)
        if kind != SeamlessM4TFeatureExtractor.__name__:
            raise ValueError(
                f"feature_extractor_type must be {SeamlessM4TFeatureExtractor.__name__!r}, "
                f"got {kind!r}: these files belong to another kind of model"
            )
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.padding_value = padding_value
        self.stride = stride
        self.padding_side = padding_side
        self.return_attention_mask = return_attention_mask
        self.use_fast_kernels = use_fast_kernels
        self.processor_class: str | None = kwargs.pop("processor_class", None)
        self._further_entries = dict(kwargs)
        self._warned_of_sampling_rate = False

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that are no attribute; a copy in the making has no entries yet.
        entries = self.__dict__.get("_further_entries", {})
        if name in entries:
            return entries[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def mel_filters(self) -> NDArray[np.float64]:
        """The triangles, float64 ``[257, num_mel_bins]``: the weight of each DFT bin in each."""
        return mel_filters(self.num_mel_bins, self.sampling_rate).copy()

    @property
    def window(self) -> NDArray[np.float64]:
        """The window of a frame, float64 ``[400]``."""
        return scaled_window() / SAMPLE_SCALE

    @torch.no_grad()
    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = True,
        pad_to_multiple_of: int | None = 2,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
        return_attention_mask: bool | None = None,
        do_normalize_per_mel_bins: bool = True,
        device: torch.device | str | None = None,
    ) -> BatchFeature:
        """Computes the features of one utterance or of a batch.

        Args:
            raw_speech: One utterance: a 1-D NumPy array, torch tensor or list of numbers. A batch:
                a list of those, a 2-D array or tensor ``[batch, num_samples]``, or a 3-D one
                ``[batch, channels, num_samples]``; in a list, a 2-D item is
                ``[channels, num_samples]``. Channel 0 of several is used. Samples are floating
                point with a full scale of 1.0, or int8, uint8, int16 or int32 PCM, which is scaled.
            padding: True or "longest": to the longest utterance; "max_length": to `max_length`;
                False or "do_not_pad": not at all.
            pad_to_multiple_of: Lengths after padding and truncation are rounded up to a multiple of
                this, in mel frames (before stacking).
            max_length: Length for `truncation` and "max_length", in mel frames (before stacking).
            truncation: Whether to cut longer utterances to `max_length`. They are normalised
                before.
            return_tensors: "pt" for torch tensors, "np" or None for NumPy arrays.
            sampling_rate: Samples per second of `raw_speech`, checked against the extractor's.
            return_attention_mask: Whether to return `attention_mask`; None: as constructed.
            do_normalize_per_mel_bins: Whether to normalise each utterance.
            device: Where to compute. None: where the first tensor of `raw_speech` is, or the CPU.
                Torch results stay there.

        Returns:
            `input_features`, float32 ``[batch, num_frames // stride, num_mel_bins * stride]``, and
            `attention_mask`, int32 ``[batch, num_frames // stride]``: 1 where a frame is valid. A
            stacked frame is valid when its second mel frame is no padding. A last mel frame that
            fills no stack is dropped. When rows have different lengths, which takes
            `return_tensors=None`, both are lists with an array per utterance.

        Raises:
            TypeError: `raw_speech` holds no samples (a file name, for instance).
            ValueError: `raw_speech` is empty, has another sampling rate or too many dimensions; an
                utterance has fewer than 400 samples (or fewer than 560 if it is to be normalised,
                since a single frame has no variance), NaN or infinite samples, or an integer type
                without a full scale; `return_tensors` is asked for rows of different lengths; or
                another argument is impossible. The message names the utterance.
        """
        pad = self._padder(padding, max_length, truncation, pad_to_multiple_of)
        kind = tensor_type(return_tensors)
        self._check_sampling_rate(sampling_rate)
        utterances = split_utterances(raw_speech)
        target = torch.device(device) if device is not None else device_of(utterances)
        waveforms = [to_waveform(samples, index) for index, samples in enumerate(utterances)]
        _check_lengths(waveforms, do_normalize_per_mel_bins)
        if len({waveform.device for waveform in waveforms}) > 1:
            waveforms = [waveform.to(target) for waveform in waveforms]
        packed = waveforms[0] if len(waveforms) == 1 else torch.cat(waveforms)
        offsets = np.cumsum([0, *(waveform.numel() for waveform in waveforms)], dtype=np.int64)
        check_amplitudes(packed, offsets)
        packed = packed.to(target)

        features, frame_offsets = log_mel_filterbank(
            packed,
            torch.from_numpy(offsets),
            num_mel_bins=self.num_mel_bins,
            sampling_rate=self.sampling_rate,
            compute_dtype=torch.float32 if target.type == "mps" else torch.float64,
            fast=self.use_fast_kernels,
        )
        if do_normalize_per_mel_bins:
            # Stacks are made after padding: a last odd frame is stacked with padding.
            features, _ = normalize_and_stack(
                features, frame_offsets, 1, fast=self.use_fast_kernels
            )
        rows, masks = pad(torch.split(features, frame_offsets.diff().tolist()), None)
        stacked = [self._stack(row, mask) for row, mask in zip(rows, masks, strict=True)]
        output = {"input_features": [row for row, _ in stacked]}
        if self._wants_mask(return_attention_mask):
            output["attention_mask"] = [mask for _, mask in stacked]
        return stack_rows(output, kind, ragged=list if return_tensors is None else None)

    def pad(
        self,
        processed_features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pads computed features to one length, as a collate function does.

        Args:
            processed_features: A mapping with `input_features`, a sequence of arrays, tensors or
                nested lists of shape ``[num_frames, num_features]`` (or one 3-D array), or a
                sequence of mappings that hold one each. An `attention_mask` is padded with zeros;
                other entries are passed on.
            padding: As in `__call__`.
            max_length: Length for `truncation` and "max_length", in frames of these features.
            truncation: Whether to cut longer utterances to `max_length`.
            pad_to_multiple_of: Lengths after padding and truncation are rounded up to this.
            return_attention_mask: Whether to return `attention_mask`; None: as constructed.
            return_tensors: "pt", "np" or None: the kind of the input, NumPy arrays for lists.

        Returns:
            `input_features` ``[batch, num_frames, num_features]``, float32 where the input was
            float64; `attention_mask`, int32 ``[batch, num_frames]``; other entries. Rows that stay
            of different lengths become NumPy arrays of objects, or lists of tensors.

        Raises:
            ValueError: `input_features` is missing or not 2-D per utterance, entries have different
                batch sizes, rows of different lengths are to become a torch tensor, or an argument
                is impossible.
        """
        pad = self._padder(padding, max_length, truncation, pad_to_multiple_of)
        kind = tensor_type(return_tensors)
        entries = collect(processed_features, "processed_features", "input_features")
        check_sizes(entries, "input_features")
        given = entries.pop("input_features")
        given_masks = entries.pop("attention_mask", None)
        if kind is None and len(given) > 0 and isinstance(given[0], Tensor):
            kind = "pt"
        rows = [to_features(row, index) for index, row in enumerate(given)]
        masks = None
        if given_masks is not None:
            masks = [
                to_mask(mask, row, index)
                for index, (mask, row) in enumerate(zip(given_masks, rows, strict=True))
            ]
        rows, masks = pad(rows, masks)
        output: dict[str, Any] = {"input_features": rows}
        if self._wants_mask(return_attention_mask):
            output["attention_mask"] = masks
        gather = ragged_array if kind != "pt" else list if return_tensors is None else None
        batch = stack_rows(output, kind, ragged=gather)
        batch.update(BatchFeature(entries).convert_to_tensors(kind or "np"))
        return batch

    @classmethod
    def _from_repository(
        cls, repository: Repository, overrides: dict[str, Any]
    ) -> SeamlessM4TFeatureExtractor:
        """Of a `processor_config.json` that holds an extractor, or a `preprocessor_config.json`."""
        entries: dict[str, Any] | None
        if Path(repository.path_or_id).is_file():
            entries = read_json(repository.path_or_id)
            entries = entries.get("feature_extractor", entries)
        else:
            processor = repository.read_json(PROCESSOR_FILE) or {}
            entries = processor.get("feature_extractor", processor.get("audio_processor"))
            if entries is None:
                entries = repository.read_json(FEATURE_EXTRACTOR_FILE)
        if entries is None:
            raise OSError(
                f"{repository.name} holds no feature extractor: neither "
                f"{FEATURE_EXTRACTOR_FILE} nor a {PROCESSOR_FILE} with one"
            )
        return cls.from_dict(entries, **overrides)

    @classmethod
    def from_dict(
        cls, feature_extractor_dict: Mapping[str, Any], **overrides: Any
    ) -> SeamlessM4TFeatureExtractor:
        """Makes an extractor of the entries of a `preprocessor_config.json`.

        Args:
            feature_extractor_dict: The entries. Unknown ones are kept.
            **overrides: Constructor arguments, or entries, to replace.

        Raises:
            TypeError: An override is neither an argument nor an entry.
            ValueError: An entry has an impossible value.
        """
        known = {*cls().to_dict(), *feature_extractor_dict, "use_fast_kernels"}
        unknown = sorted(set(overrides) - known)
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: no argument of {cls.__name__}")
        return cls(**{**feature_extractor_dict, **overrides})

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> SeamlessM4TFeatureExtractor:
        """Makes an extractor of a JSON file's entries.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is broken, or an entry has an impossible value.
        """
        return cls.from_dict(read_json(json_file))

    def to_dict(self) -> dict[str, Any]:
        """The entries of the `preprocessor_config.json` of this extractor."""
        processor_class = self.processor_class
        return {
            **self._further_entries,
            **({} if processor_class is None else {"processor_class": processor_class}),
            "feature_extractor_type": SeamlessM4TFeatureExtractor.__name__,
            "feature_size": self.feature_size,
            "num_mel_bins": self.num_mel_bins,
            "padding_side": self.padding_side,
            "padding_value": self.padding_value,
            "return_attention_mask": self.return_attention_mask,
            "sampling_rate": self.sampling_rate,
            "stride": self.stride,
        }

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return to_json_string(self.to_dict())

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` to a JSON file."""
        write_json(json_file_path, self.to_dict())

    def _write_files(self, folder: Path) -> list[str]:
        """A `processor_config.json` that holds an extractor would win over the file when the folder
        is loaded: it is brought up to date."""
        path = make_folder(folder) / FEATURE_EXTRACTOR_FILE
        write_json(path, self.to_dict())
        processor_path = folder / PROCESSOR_FILE
        if processor_path.is_file():
            processor = read_json(processor_path)
            nested = [key for key in ("feature_extractor", "audio_processor") if key in processor]
            if nested:
                processor.update({key: self.to_dict() for key in nested})
                write_json(processor_path, processor)
        return [str(path)]

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            if not self._warned_of_sampling_rate:
                self._warned_of_sampling_rate = True
                logger.warning(
                    "sampling_rate was not given, so that audio of another rate than %d Hz goes "
                    "unnoticed. Pass sampling_rate to have it checked.",
                    self.sampling_rate,
                )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate must be {self.sampling_rate} Hz, which the model was trained on, "
                f"got {sampling_rate} Hz. Resample the audio first"
            )

    def _padder(
        self, padding: object, max_length: int | None, truncation: bool, multiple: int | None
    ) -> partial[tuple[list[Tensor], list[Tensor]]]:
        """`pad_rows` as the arguments say, which are checked."""
        strategy = padding_strategy(padding, max_length)
        check_length_arguments(max_length, truncation, multiple)
        return partial(
            pad_rows,
            strategy=strategy,
            max_length=max_length,
            truncation=truncation,
            multiple=multiple,
            side=self.padding_side,
            value=self.padding_value,
        )

    def _wants_mask(self, return_attention_mask: bool | None) -> bool:
        wanted = return_attention_mask
        return self.return_attention_mask if wanted is None else wanted

    def _stack(self, row: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Stacks ``[frames, bins]`` to ``[frames // stride, bins * stride]``, and the mask."""
        num_stacks = len(row) // self.stride
        used = num_stacks * self.stride
        stacked = row[:used].reshape(num_stacks, self.stride * row.shape[1])
        deciding_frame = min(1, self.stride - 1)
        return stacked, mask[:used].reshape(num_stacks, self.stride)[:, deciding_frame]


def _check_lengths(waveforms: Sequence[Tensor], normalize: bool) -> None:
    """Raises ValueError for an utterance that is too short for its features."""
    needed = FRAME_LENGTH + (FRAME_SHIFT if normalize else 0)
    reason = "two frames, since one alone has no variance" if normalize else "one frame"
    for index, waveform in enumerate(waveforms):
        if waveform.numel() < needed:
            raise ValueError(
                f"utterance {index} has {waveform.numel()} samples; at least {needed} are needed "
                f"({reason})"
            )
