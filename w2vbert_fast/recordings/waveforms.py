"""What callers hand over as audio, turned into float32 waveforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Full scale of the integer types that audio is stored in: (value - offset) / scale is in [-1, 1].
_PCM_SCALES = {
    torch.int8: (0.0, 2.0**7),
    torch.uint8: (128.0, 2.0**7),
    torch.int16: (0.0, 2.0**15),
    torch.int32: (0.0, 2.0**31),
}
# Energies of larger samples would come near the limits of float32.
_LARGEST_AMPLITUDE = 1e9


def split_utterances(raw_speech: Any) -> list[Any]:
    """The utterances of a call, each an array, a tensor or a list.

    Args:
        raw_speech: One utterance: a 1-D array, tensor or list of numbers. A batch: a list of
            utterances, an array or tensor ``[batch, num_samples]`` or
            ``[batch, channels, num_samples]``.

    Raises:
        TypeError: It is something else, e.g. a file name.
        ValueError: It is an empty batch or has more dimensions.
    """
    if isinstance(raw_speech, np.ndarray | Tensor):
        if raw_speech.ndim > 3:
            raise ValueError(
                "raw_speech must be [num_samples], [batch, num_samples] or "
                f"[batch, channels, num_samples], got shape {list(raw_speech.shape)}"
            )
        utterances = [raw_speech] if raw_speech.ndim <= 1 else list(raw_speech)
    elif isinstance(raw_speech, list | tuple):
        utterances = list(raw_speech)
        if utterances and not _has_samples(utterances[0]):
            utterances = [raw_speech]
    else:
        raise TypeError(
            "raw_speech must be a NumPy array, a torch tensor or a list of samples, or a list of "
            f"those, got {type(raw_speech).__name__}"
        )
    if not utterances:
        raise ValueError("raw_speech must hold at least one utterance, got an empty batch")
    return utterances


def _has_samples(item: Any) -> bool:
    if isinstance(item, np.ndarray | Tensor):
        return item.ndim > 0
    return isinstance(item, list | tuple)


def device_of(utterances: Sequence[Any]) -> torch.device:
    """The device of the first tensor, or the CPU."""
    for samples in utterances:
        if isinstance(samples, Tensor):
            return samples.device
    return torch.device("cpu")


def to_waveform(samples: Any, index: int) -> Tensor:
    """One utterance as a float32 waveform.

    Args:
        samples: Array, tensor or list of samples, ``[num_samples]`` or ``[channels, num_samples]``,
            of which channel 0 is taken. Floating point with a full scale of 1.0, or int8, uint8,
            int16 or int32 PCM, which is scaled. Other integers are taken as they are if they are
            -1, 0 and 1 only.
        index: Number of the utterance, for messages.

    Returns:
        float32 ``[num_samples]`` on the device of `samples`.

    Raises:
        TypeError: There are no numbers in it.
        ValueError: It has another shape, or integers without a full scale.
    """
    waveform = samples.detach() if isinstance(samples, Tensor) else _to_tensor(samples, index)
    if waveform.dim() == 2 and waveform.shape[0] > 0:
        if waveform.shape[0] > waveform.shape[1]:
            raise ValueError(
                f"utterance {index} must be [channels, num_samples], got shape "
                f"{list(waveform.shape)}, which has more channels than samples; transpose it"
            )
        waveform = waveform[0]
    if waveform.dim() != 1:
        raise ValueError(
            f"utterance {index} must be [num_samples] or [channels, num_samples], got shape "
            f"{list(waveform.shape)}"
        )
    return _to_float(waveform, index)


def _to_tensor(samples: Any, index: int) -> Tensor:
    try:
        array = np.asarray(samples)
    except (TypeError, ValueError) as error:
        raise TypeError(f"utterance {index} is no list of samples: {error}") from error
    if array.dtype.kind not in "fiu":
        raise TypeError(
            f"samples of utterance {index} must be floating point or integer, got {array.dtype}"
        )
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    # torch takes neither foreign byte orders nor negative strides.
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _to_float(waveform: Tensor, index: int) -> Tensor:
    if waveform.is_floating_point():
        return waveform.float()
    if waveform.dtype in _PCM_SCALES:
        offset, scale = _PCM_SCALES[waveform.dtype]
        return (waveform.float() - offset) / scale
    if waveform.is_complex() or waveform.dtype == torch.bool:
        raise TypeError(
            f"samples of utterance {index} must be floating point or integer, got {waveform.dtype}"
        )
    # Python's integers arrive as int64. Zeros and ones are the same number in every scale.
    if waveform.dtype == torch.int64 and bool(waveform.abs().le(1).all()):
        return waveform.float()
    raise ValueError(
        f"samples of utterance {index} are {waveform.dtype}, which has no full scale; convert them "
        "to floating point in [-1, 1], or to int16 or int32"
    )


def check_amplitudes(packed: Tensor, offsets: NDArray[np.int64]) -> None:
    """Checks that all samples are finite and of a sensible size.

    Args:
        packed: float32 ``[num_samples]``, the samples of all utterances end to end.
        offsets: ``[batch + 1]``, where each utterance begins and ends.

    Raises:
        ValueError: A sample is NaN, infinite or beyond 1e9; names the first such utterance.
    """
    lowest, highest = torch.aminmax(packed)
    if float(lowest) >= -_LARGEST_AMPLITUDE and float(highest) <= _LARGEST_AMPLITUDE:
        return
    sensible = packed.abs() <= _LARGEST_AMPLITUDE
    position = int(sensible.logical_not().nonzero()[0])
    index = int(np.searchsorted(offsets, position, side="right")) - 1
    raise ValueError(
        f"utterance {index} has a sample of {float(packed[position])} at position "
        f"{position - int(offsets[index])}; samples must be finite and are expected in [-1, 1]"
    )
