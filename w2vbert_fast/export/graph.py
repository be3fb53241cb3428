"""A model as one module of plain tensors, with named inputs and outputs: what is exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w2vbert_fast.export import padded
from w2vbert_fast.export.waveform import WaveformFeatures
from w2vbert_fast.models.model import Wav2Vec2BertModel, hidden_state_index
from w2vbert_fast.models.optimized.int8 import Int8Linear
from w2vbert_fast.models.optimized.packed import PackedLinear
from w2vbert_fast.models.pooling import (
    Statistics,
    checked_statistics,
    normalize_with_statistics,
    without_padding,
)
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel
from w2vbert_fast.ops.fbank import FRAME_LENGTH, FRAME_SHIFT
from w2vbert_fast.processing.features import SeamlessM4TFeatureExtractor

# Three make two stacks: for one alone the graph would have to be another.
_FEWEST_MEL_FRAMES = 3


@dataclass(frozen=True)
class Signature:
    """Names of a graph's tensors, in order, with their dynamic dimensions.

    Attributes:
        inputs: for each input the names of its dimensions; a number is a fixed size.
        outputs: names.
    """

    inputs: dict[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]


class ExportGraph(nn.Module):
    """Features or waveforms in; hidden states, logits or embeddings out.

    Args:
        model: in evaluation mode; its modules are used, not copied.
        extractor: with one, waveforms go in; `None`: features.
        layer: of the encoder, give `hidden_states[layer]` and nothing of what comes behind; `None`:
            what the model's `forward` gives.
        stats: mean and variance to normalise that hidden state with, as for `encode`.

    Raises:
        TypeError: the model is none of this package's, or `stats` is no pair or mapping.
        ValueError: the model is in training mode, quantised to int8, packed or not in float32, or
            an argument does not fit it.
    """

    mean: Tensor | None
    variance: Tensor | None

    def __init__(
        self,
        model: Wav2Vec2BertPreTrainedModel,
        extractor: SeamlessM4TFeatureExtractor | None = None,
        *,
        layer: int | None = None,
        stats: Statistics | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, Wav2Vec2BertPreTrainedModel):
            raise TypeError(
                f"model is {type(model).__module__}.{type(model).__qualname__}; it must be one of "
                "w2vbert_fast's models"
            )
        if model.training:
            raise ValueError("model is in training mode; call model.eval() first")
        if any(isinstance(module, Int8Linear) for module in model.modules()):
            raise ValueError("model is quantised to int8; export it as float32")
        if any(isinstance(module, PackedLinear) for module in model.modules()):
            raise ValueError("model has packed weights; export it as it was before pack_weights()")
        if model.dtype != torch.float32:
            raise ValueError(f"model has {model.dtype} weights; export it as float32")
        encoder = model.base_model
        assert isinstance(encoder, Wav2Vec2BertModel)
        config = model.config
        if layer is not None:
            layer = hidden_state_index(layer, encoder.encoder.num_layers)
        if stats is not None and layer is None:
            raise ValueError("stats were given without layer, whose hidden state they normalise")
        width = config.feature_projection_input_dim
        if extractor is not None and extractor.num_mel_bins * extractor.stride != width:
            raise ValueError(
                f"the feature extractor gives {extractor.num_mel_bins * extractor.stride} features "
                f"a frame; the model takes {width}"
            )
        # In a list the model is no submodule, all of whose weights would be exported.
        self._whole = [model]
        self.part: nn.Module = model if layer is None else _front(encoder, layer)
        self.layer = layer
        self.extractor = extractor
        self.features = None if extractor is None else WaveformFeatures(extractor)
        statistics = None if stats is None else checked_statistics(stats, config.hidden_size)
        mean, variance = (None, None) if statistics is None else statistics
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.signature = Signature(self._inputs(width), self._outputs())

    @property
    def model(self) -> Wav2Vec2BertPreTrainedModel:
        """The model, of which `part` is what the graph needs."""
        return self._whole[0]

    @property
    def encoder(self) -> Wav2Vec2BertModel:
        """The model's encoder."""
        encoder = self.model.base_model
        assert isinstance(encoder, Wav2Vec2BertModel)
        return encoder

    def _inputs(self, width: int) -> dict[str, tuple[str | int, ...]]:
        if self.features is not None:
            return {"waveform": ("batch", "samples"), "num_samples": ("batch",)}
        return {
            "input_features": ("batch", "frames", width),
            "attention_mask": ("batch", "frames"),
        }

    def _outputs(self) -> tuple[str, ...]:
        if self.layer is not None:
            return ("hidden_state", "lengths")
        if not self.model.EXPORTED:
            raise TypeError(f"there is no export of {type(self.model).__name__}")
        return self.model.EXPORTED

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """The outputs that `signature` names.

        Args:
            first: `waveform`, float32 `[batch, samples]`, or `input_features`, float32
                `[batch, T, features]`.
            second: `num_samples`, int64 `[batch]`, or `attention_mask`, int64 `[batch, T]`.
        """
        if self.features is not None:
            features, mask = self.features(first, second)
        else:
            features, mask = first, second != 0
        tokens = padded.tokens_of(features, mask)
        if self.layer is not None:
            assert isinstance(self.part, Wav2Vec2BertModel)
            x = padded.encode(self.part, features, mask, self.layer)[-1]
            if self.mean is not None and self.variance is not None:
                x = normalize_with_statistics(x, self.mean, self.variance)
            return without_padding(x, tokens), mask.sum(1)
        num_layers = self.encoder.encoder.num_layers
        return self._head(padded.encode(self.encoder, features, mask, num_layers), mask, tokens)

    def _head(self, states: list[Tensor], mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        mix = getattr(model, "layer_weights", None)
        if mix is not None:
            # The mix is of the encoder's states, so that an adapter counts for nothing.
            weights = torch.softmax(mix, dim=-1)
            x = torch.einsum("l,lbtc->btc", weights, torch.stack(states))
        else:
            x, mask, tokens = padded.finish(self.encoder, states[-1], mask, tokens)
        outputs: tuple[Tensor, ...] = model.padded_outputs(x, mask, tokens)
        return outputs

    def answers_of_the_model(self, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """What the extractor and the packed model themselves give for these inputs."""
        if self.extractor is not None:
            rows = [row[:n] for row, n in zip(first, second.tolist(), strict=True)]
            rate = self.extractor.sampling_rate
            batch = self.extractor(rows, sampling_rate=rate, return_tensors="pt")
            first, second = batch["input_features"], batch["attention_mask"]
        lengths = second.sum(1)
        if self.layer is not None:
            statistics = None
            if self.mean is not None and self.variance is not None:
                statistics = (self.mean, self.variance)
            return self.encoder.encode(first, second, layer=self.layer, stats=statistics), lengths
        output = self.model(first, second)
        if not hasattr(self.model, "layer_weights"):
            lengths = self.encoder.valid_lengths(second)
        return tuple(lengths if n == "lengths" else output[n] for n in self.signature.outputs)

    def fewest(self) -> int:
        """Frames or samples that every row of an input must have at least."""
        frames = 1 if self.layer is not None else self.model.fewest_frames
        if self.layer is None and self.encoder.adapter is not None:
            kernel, stride = self.model.config.adapter_kernel_size, self.model.config.adapter_stride
            # Two frames at the end: for one alone the graph would have to be another. What reads a
            # mix of the encoder's states counts its frames in front of the adapter.
            behind = 2 if hasattr(self.model, "layer_weights") else max(2, frames)
            for _ in range(self.model.config.num_adapter_layers):
                behind = max(behind, (behind - 1) * stride + kernel - 2 * (stride // 2))
            frames = max(frames, behind)
        if self.features is None:
            return frames
        mel_frames = max(_FEWEST_MEL_FRAMES, frames * self.features.stride)
        return FRAME_LENGTH + (mel_frames - 1) * FRAME_SHIFT

    def example(self, batch: int, longest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random inputs of `batch` rows whose valid parts have different lengths.

        Args:
            batch: rows.
            longest: frames or samples of the first row; the others are shorter by up to a half.
            seed: of the random values.
        """
        generator = torch.Generator().manual_seed(seed)
        least = min(longest, max(self.fewest(), longest // 2))
        lengths = torch.linspace(longest, least, batch).round().to(torch.int64)
        if self.features is not None:
            return 0.1 * torch.randn(batch, longest, generator=generator), lengths
        width = self.model.config.feature_projection_input_dim
        mask = (torch.arange(longest) < lengths[:, None]).to(torch.int64)
        return torch.randn(batch, longest, width, generator=generator), mask


def _front(model: Wav2Vec2BertModel, num_layers: int) -> Wav2Vec2BertModel:
    """The model without what lies behind its first so many layers; modules are shared."""
    stack = copy.copy(model.encoder)
    stack._modules = dict(stack._modules)
    stack.layers = nn.ModuleList(list(model.encoder.layers)[:num_layers])
    front = copy.copy(model)
    front._modules = dict(front._modules)
    front._parameters = {}  # the embedding of masked frames
    front.encoder, front.adapter, front.intermediate_ffn = stack, None, None
    return front
