"""The bare model: feature projection, SpecAugment, the encoder's layers and the adapter.

Reference: `Wav2Vec2BertModel` in transformers. A tensor's way: padded `input_features`
`[batch, T, 160]` are packed once, go through all of it as `[num_tokens, ...]`, and are unpacked
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from w2vbert_fast.layout import PackedBatch, sequence_ids
from w2vbert_fast.models.adapter import Wav2Vec2BertAdapter
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.encoder import Wav2Vec2BertEncoder
from w2vbert_fast.models.layers import (
    Initial,
    Wav2Vec2BertFeatureProjection,
    Wav2Vec2BertFeedForward,
)
from w2vbert_fast.models.optimized.sizes import are_watched, in_few_sizes
from w2vbert_fast.models.outputs import HiddenStates, Wav2Vec2BaseModelOutput, as_requested
from w2vbert_fast.models.pooling import (
    Statistics,
    checked_statistics,
    mean_over_frames,
    normalize_with_statistics,
    without_padding,
)
from w2vbert_fast.models.pretrained import Wav2Vec2BertPreTrainedModel
from w2vbert_fast.models.spec_augment import sample_mask_spans

HiddenStatesRequest = bool | int | Sequence[int] | None


def requested_hidden_states(request: HiddenStatesRequest, num_layers: int) -> set[int]:
    """Indices into `hidden_states` that `output_hidden_states` asks for.

    Args:
        request: `True` for all `num_layers + 1`, `False` or `None` for none, or one index or
            several (negative ones count from the end).
        num_layers: encoder layers.

    Raises:
        ValueError: an index is out of range.
    """
    if request is None or isinstance(request, bool):
        return set(range(num_layers + 1)) if request else set()
    indices = [request] if isinstance(request, int) else list(request)
    return {hidden_state_index(i, num_layers, "output_hidden_states") for i in indices}


def hidden_state_index(index: object, num_layers: int, argument: str = "layer") -> int:
    """An index into `hidden_states`, counted from the front.

    Args:
        index: 0 to `num_layers`, or negative, from the end.
        num_layers: encoder layers.
        argument: where the index is from, for the message.

    Raises:
        ValueError: it is no integer, or out of range.
    """
    if (
        isinstance(index, bool)
        or not isinstance(index, int)
        or not -num_layers - 1 <= index <= num_layers
    ):
        raise ValueError(
            f"{argument} is {index!r}; a model of {num_layers} layers has hidden states 0 to "
            f"{num_layers}"
        )
    return index % (num_layers + 1)


@dataclass
class PackedEncoding:
    """What the bare model hands to a head.

    Attributes:
        hidden_state: `[N', C']`, the model's output; there may be rows behind those of `layout`.
        layout: where `hidden_state`'s utterances lie (shorter than the input's behind an adapter).
        input_layout: the layout of the input and of `hidden_states`.
        extract_features: `[N, feature_dim]`, as `hidden_state`.
        hidden_states: padded, `[batch, T, C]` each, by index.
        attentions: `[batch, heads, T, T]` each.
    """

    hidden_state: Tensor
    layout: PackedBatch
    input_layout: PackedBatch
    extract_features: Tensor
    hidden_states: dict[int, Tensor]
    attentions: list[Tensor]


class Wav2Vec2BertModel(Wav2Vec2BertPreTrainedModel):
    """The bare encoder: mel features in, hidden states out.

    Follows `Wav2Vec2BertModel` of transformers 5.23. Differences, all in padded batches: an
    utterance's output is what the reference gives for it alone, and padded positions of every
    output are zero.
    """

    EXPORTED = ("last_hidden_state", "lengths")
    INITIAL: ClassVar[Initial] = {"masked_spec_embed": nn.init.uniform_}

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__(config)
        self.feature_projection = Wav2Vec2BertFeatureProjection(config)
        if config.mask_time_prob > 0.0 or config.mask_feature_prob > 0.0:
            self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = Wav2Vec2BertEncoder(config)
        self.adapter = Wav2Vec2BertAdapter(config) if config.add_adapter else None
        self.intermediate_ffn: Wav2Vec2BertFeedForward | None = None
        if config.use_intermediate_ffn_before_adapter:
            self.intermediate_ffn = Wav2Vec2BertFeedForward(config, act_fn="relu")
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
        return_dict: bool | None = None,
    ) -> Wav2Vec2BaseModelOutput | tuple[Any, ...]:
        """Encode a padded batch.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; the valid frames of an
                utterance must be contiguous. `None`: all are.
            mask_time_indices: bool `[batch, T]`, frames to replace by `masked_spec_embed`, also
                outside training. `None`: drawn in training when `mask_time_prob` is above 0.
            output_attentions: also return attention maps. `None`: as `config` says.
            output_hidden_states: `True`, or the indices to keep (the other places are `None`).
            return_dict: `False` for a plain tuple. `None`: as `config` says.

        Raises:
            ValueError: a shape does not fit, or `mask_time_indices` is given to a model without
                `masked_spec_embed`.
        """
        encoding = self.encode_packed(
            input_features,
            attention_mask,
            mask_time_indices,
            output_attentions,
            output_hidden_states,
        )
        # Behind the last layer there may be nothing more.
        last = encoding.hidden_states.get(self.encoder.num_layers)
        if last is None or self.adapter is not None or self.intermediate_ffn is not None:
            last = encoding.layout.unpack(encoding.hidden_state)
        output = Wav2Vec2BaseModelOutput(
            last_hidden_state=last,
            extract_features=encoding.input_layout.unpack(encoding.extract_features),
            hidden_states=self.unpack_hidden_states(encoding, output_hidden_states),
            attentions=self.unpack_attentions(encoding, output_attentions),
        )
        return as_requested(output, return_dict, self.config.return_dict)

    def encode_packed(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: HiddenStatesRequest = None,
    ) -> PackedEncoding:
        """`forward` without the unpacking, for heads; same arguments."""
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        layout = self._layout(input_features, attention_mask)
        # Attention maps are of all rows.
        filled = layout if output_attentions else self._filled(layout, input_features)
        x, extract_features = self.feature_projection(filled.pack(input_features))
        x = filled.zero_half_frames(self._spec_augment(x, filled, mask_time_indices))
        wanted = requested_hidden_states(output_hidden_states, self.encoder.num_layers)
        x, kept, attentions = self.encoder(x, filled, wanted, bool(output_attentions))
        if self.intermediate_ffn is not None:
            x = x + 0.5 * self.intermediate_ffn(x)
        out_layout = layout
        if self.adapter is not None:
            x, out_layout = self.adapter(x, layout)
        return PackedEncoding(x, out_layout, layout, extract_features, kept, attentions)

    def _filled(self, layout: PackedBatch, input_features: Tensor) -> PackedBatch:
        fast = self.encoder.may_be_filled()
        return in_few_sizes(layout, input_features, self._is_watched, fast=fast)

    def _is_watched(self) -> bool:
        return are_watched(self._modules.values())

    def _layout(self, input_features: Tensor, attention_mask: Tensor | None) -> PackedBatch:
        self._check_call(input_features, attention_mask)
        width = self.config.feature_projection_input_dim
        if input_features.dim() != 3 or input_features.shape[2] != width:
            raise ValueError(
                f"input_features has shape {tuple(input_features.shape)}; it must be "
                f"(batch, frames, {width})"
            )
        batch_size, frames, _ = input_features.shape
        return PackedBatch.from_attention_mask(
            attention_mask, batch_size, frames, input_features.device, input_features
        )

    @torch.no_grad()
    def encode(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        *,
        layer: int = -1,
        stats: Statistics | None = None,
        pool: str | None = None,
    ) -> Tensor:
        """One hidden state, as codecs, TTS and retrieval read it; no layer behind it is computed.

        No gradient is recorded; `forward(output_hidden_states=[layer])` records one.

        Args:
            input_features: floating `[batch, T, feature_projection_input_dim]`.
            attention_mask: `[batch, T]`, non-zero where a frame is valid; `None`: all are.
            layer: index into `hidden_states`: 0 is what enters the first layer, k is the output of
                the k-th layer, -1 that of the last (in front of an adapter).
            stats: mean and variance `[hidden_size]` each, a pair or a mapping with the entries
                "mean" and "var" (such as `wav2vec2bert_stats.pt` holds). The result is
                `(x - mean) / sqrt(var)`, as in IndexTTS2 and MaskGCT.
            pool: "mean": the mean over each utterance's valid frames, after `stats`. `None`: all
                frames.

        Returns:
            `[batch, T, hidden_size]`, zero in padding, or with `pool` `[batch, hidden_size]`, zero
            for an utterance without valid frames.

        Raises:
            ValueError: an argument is impossible.
            TypeError: `stats` is neither a pair nor a mapping.
            RuntimeError: the model is in training mode, in which hidden states are random.
        """
        num_layers = hidden_state_index(layer, self.encoder.num_layers)
        if pool not in (None, "mean"):
            raise ValueError(f"pool is {pool!r}; it must be 'mean' or None")
        if stats is not None:
            stats = checked_statistics(stats, self.config.hidden_size)
        if self.training:
            raise RuntimeError(
                "encode was called in training mode, in which dropout, LayerDrop and SpecAugment "
                "make hidden states random; call model.eval() first"
            )
        layout = self._layout(input_features, attention_mask)
        filled = self._filled(layout, input_features)
        x, _ = self.feature_projection(filled.pack(input_features))
        x = filled.zero_half_frames(x)
        x, _, _ = self.encoder(x, filled, set(), False, num_layers)
        if stats is not None:
            x = normalize_with_statistics(x, *stats)
        return mean_over_frames(x, layout) if pool == "mean" else layout.unpack(x)

    def padded_outputs(self, x: Tensor, mask: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """`last_hidden_state` and `lengths`."""
        return without_padding(x, tokens), mask.sum(1)

    def unpack_hidden_states(
        self, encoding: PackedEncoding, output_hidden_states: HiddenStatesRequest
    ) -> HiddenStates | None:
        """The `hidden_states` field, or `None` when it was not asked for."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states is None or output_hidden_states is False:
            return None
        return tuple(map(encoding.hidden_states.get, range(self.encoder.num_layers + 1)))

    def unpack_attentions(
        self, encoding: PackedEncoding, output_attentions: bool | None
    ) -> HiddenStates | None:
        """The `attentions` field at the padded size `[batch, heads, T, T]`, or `None`."""
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        if not wanted:
            return None
        return tuple(_place_maps(maps, encoding.input_layout) for maps in encoding.attentions)

    def valid_lengths(self, attention_mask: Tensor) -> Tensor:
        """Output frames of each utterance, the adapter's shortening included.

        Args:
            attention_mask: `[batch, T]`, non-zero where an input frame is valid.

        Returns:
            int64 `[batch]` on the mask's device.
        """
        lengths = (attention_mask != 0).sum(-1)
        return self._get_feat_extract_output_lengths(lengths, self.adapter is not None)

    def _spec_augment(
        self, x: Tensor, layout: PackedBatch, mask_time_indices: Tensor | None
    ) -> Tensor:
        config = self.config
        if not config.apply_spec_augment:
            return x
        masked = None
        if mask_time_indices is None and self.training and config.mask_time_prob > 0:
            by_length = sample_mask_spans(
                layout.valid_lengths,
                layout.max_seqlen,
                mask_prob=config.mask_time_prob,
                mask_length=config.mask_time_length,
                min_masks=config.mask_time_min_masks,
            )
            masked = layout.right_padded().pack(by_length.to(x.device))
        elif mask_time_indices is not None:
            if not hasattr(self, "masked_spec_embed"):
                raise ValueError(
                    "mask_time_indices was given, but the model has no masked_spec_embed: "
                    "config.mask_time_prob and config.mask_feature_prob are both 0"
                )
            shape = (layout.batch_size, layout.padded_length)
            if tuple(mask_time_indices.shape) != shape:
                raise ValueError(
                    f"mask_time_indices has shape {tuple(mask_time_indices.shape)}; "
                    f"it must be {shape}"
                )
            masked = layout.pack(mask_time_indices.to(x.device).bool())
        if masked is not None:
            x = torch.where(masked[:, None], self.masked_spec_embed.to(x.dtype), x)
        if self.training and config.mask_feature_prob > 0:
            channels = sample_mask_spans(
                [config.hidden_size] * layout.batch_size,
                config.hidden_size,
                mask_prob=config.mask_feature_prob,
                mask_length=config.mask_feature_length,
                min_masks=config.mask_feature_min_masks,
            ).to(x.device)
            x = x.masked_fill(channels[sequence_ids(layout.cu_seqlens, x.shape[0])], 0.0)
        return x


def _place_maps(maps: Tensor, layout: PackedBatch) -> Tensor:
    """Attention maps over an utterance's own frames -> maps over the padded frames."""
    frames = layout.padded_length
    if layout.is_right_padded and frames == layout.max_seqlen:
        return maps
    out = maps.new_zeros(layout.batch_size, maps.shape[1], frames, frames)
    assert layout.token_positions is not None
    positions, token = layout.token_positions.tolist(), 0
    for row, length in enumerate(layout.lengths):
        if length > 0:
            start = positions[token] % frames
            stop = start + length
            out[row, :, start:stop, start:stop] = maps[row, :, :length, :length]
        token += length
    return out
