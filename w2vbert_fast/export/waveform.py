"""Log-mel features as part of an exported graph: waveforms in, normalised and stacked frames out.

The recipe is that of `ops.fbank`. Up to the DFT all of it is linear in a frame's 400 samples, so a
frame's spectrum is one product with a constant matrix `[400, 2 * 257]`, which every engine has,
unlike an FFT. It is a float64 product for the reason that `ops.fbank` gives.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from w2vbert_fast.ops import fbank
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor


class WaveformFeatures(nn.Module):
    """The feature extractor as a module of tensor operations.

    Args:
        extractor: whose features these are.

    Raises:
        ValueError: it stacks other than 1 or 2 frames.
    """

    spectrum: Tensor
    filters: Tensor

    def __init__(self, extractor: SeamlessM4TFeatureExtractor) -> None:
        super().__init__()
        if extractor.stride not in (1, 2):
            raise ValueError(
                f"the feature extractor's stride is {extractor.stride}; features inside the graph "
                "need 1 or 2"
            )
        self.stride = extractor.stride
        self.padding_value = extractor.padding_value
        filters = fbank.mel_filters(extractor.num_mel_bins, extractor.sampling_rate)
        self.register_buffer("spectrum", torch.from_numpy(_frame_to_spectrum()))
        self.register_buffer("filters", torch.tensor(filters))

    def forward(self, waveform: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a padded batch.

        Args:
            waveform: float32 `[batch, S]`, full scale 1.0, S at least 400; padding on the right.
            num_samples: int64 `[batch]`, the samples of each row that are no padding.

        Returns:
            float32 `[batch, T, stride * num_mel_bins]`, the extractor's `padding_value` in padding,
            and the mask, bool `[batch, T]`; a last frame that fills no stack makes a masked one, as
            in the extractor.
        """
        shift, length = fbank.FRAME_SHIFT, fbank.FRAME_LENGTH
        samples = torch.arange(waveform.shape[1], device=waveform.device)
        waveform = waveform.masked_fill(samples >= num_samples[:, None], 0.0)
        # Indices, not views: of a view torch.export would have to prove that its sizes divide.
        total = (waveform.shape[1] - length) // shift + 1
        index = torch.arange(total, device=waveform.device)
        within = torch.arange(length, device=waveform.device)
        frames = waveform[:, index[:, None] * shift + within].double()  # [batch, frames, 400]
        real, imaginary = (frames @ self.spectrum).chunk(2, dim=2)
        energies = (real * real + imaginary * imaginary) @ self.filters
        features = energies.float().clamp(min=fbank.MEL_FLOOR).log().double()

        counts = torch.div(num_samples - length, shift, rounding_mode="floor") + 1
        counts = torch.where(num_samples < length, 0, counts)
        padding = (index >= counts[:, None])[..., None]
        divisor = counts[:, None, None].double()
        mean = features.masked_fill(padding, 0.0).sum(1, keepdim=True) / divisor.clamp(min=1.0)
        centred = (features - mean).masked_fill(padding, 0.0)
        variance = (centred * centred).sum(1, keepdim=True) / (divisor - 1.0).clamp(min=1.0)
        features = (centred / torch.sqrt(variance + fbank.VARIANCE_FLOOR)).float()

        # Rounded up to pairs of frames, as the extractor pads.
        rows = torch.arange((total + 1) // 2 * (2 // self.stride), device=waveform.device)
        parts = [rows * self.stride + part for part in range(self.stride)]
        features = torch.cat(
            [
                features[:, part.clamp(max=total - 1)].masked_fill(
                    (part >= counts[:, None])[..., None], self.padding_value
                )
                for part in parts
            ],
            dim=2,
        )
        stacks = torch.div(counts, self.stride, rounding_mode="floor")
        return features, rows < stacks[:, None]


def _frame_to_spectrum() -> NDArray[np.float64]:
    """The linear map from a frame's samples to its spectrum, `[400, 2 * 257]`: real parts, then
    imaginary ones."""
    length = fbank.FRAME_LENGTH
    centred = np.eye(length) - 1.0 / length
    emphasised = centred.copy()  # rows are samples in, columns samples out
    emphasised[:, 1:] -= fbank.PREEMPHASIS * centred[:, :-1]
    emphasised[:, 0] *= 1.0 - fbank.PREEMPHASIS
    spectrum = np.fft.rfft(emphasised * fbank.scaled_window(), n=fbank.FFT_LENGTH, axis=1)
    return np.ascontiguousarray(np.concatenate((spectrum.real, spectrum.imag), axis=1))
