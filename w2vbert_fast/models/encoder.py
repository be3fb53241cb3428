"""The stack of Conformer layers, `[num_tokens, hidden_size]` in and out.

Reference: `Wav2Vec2BertEncoder` in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig
from w2vbert_fast.models.layers import Wav2Vec2BertEncoderLayer, is_untouched
from w2vbert_fast.models.optimized.graphs import LayerGraphs
from w2vbert_fast.models.optimized.replay import layer_runner
from w2vbert_fast.models.positions import (
    Wav2Vec2BertRelPositionalEmbedding,
    Wav2Vec2BertRotaryPositionalEmbedding,
)
from w2vbert_fast.models.recompute import LayerPlan, Recompute
from w2vbert_fast.ops.dispatch import on_triton_device, records_gradient


class Wav2Vec2BertEncoder(nn.Module):
    """Conformer layers over packed tokens: `config.num_hidden_layers`, or what is left of them.

    A caller may cut `layers` to spend nothing on those behind; `num_layers` is what counts.
    """

    use_fast_kernels = False
    layer_graphs: LayerGraphs | None = None  # set by `compile_for_inference`

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_positions: nn.Module | None = None
        if config.position_embeddings_type == "relative":
            self.embed_positions = Wav2Vec2BertRelPositionalEmbedding(config)
        elif config.position_embeddings_type == "rotary":
            self.embed_positions = Wav2Vec2BertRotaryPositionalEmbedding(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(
            Wav2Vec2BertEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.recompute = Recompute()

    @property
    def num_layers(self) -> int:
        """Number of layers that are there."""
        return len(self.layers)

    def may_be_filled(self) -> bool:
        """Whether rows that are nobody's may be behind those of the utterances
        (`optimized.sizes`): nobody has replaced a layer.

        Where there are CUDA graphs these fill their own buckets. Attention with Transformer-XL
        positions pads all utterances to the longest, which further rows may make longer.
        """
        return (
            self.use_fast_kernels
            and self.config.position_embeddings_type != "relative"
            and not self.training
            and self.layer_graphs is None
            and all(type(layer) is Wav2Vec2BertEncoderLayer for layer in self.layers)
        )

    def forward(
        self,
        hidden_states: Tensor,
        layout: PackedBatch,
        wanted: set[int],
        output_attentions: bool,
        num_layers: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor], list[Tensor]]:
        """Run the layers.

        Args:
            hidden_states: `[N, C]`.
            layout: the utterances.
            wanted: indices of the hidden states to keep (0 is what enters the first layer).
            output_attentions: keep the attention maps.
            num_layers: run the first so many layers; `None`: all.

        Returns:
            The last layer's output `[N, C]`, the kept hidden states `[batch, T, C]` by index, and
            the maps `[batch, heads, T, T]` of each layer. A layer that LayerDrop skips hands its
            input on and gives no map. Where a gradient is recorded, that of the output reaches the
            kept hidden states.
        """
        attentions: list[Tensor] = []
        found = None
        if (
            not torch.compiler.is_compiling()
            and self.layer_graphs is not None
            and not output_attentions
        ):
            found = self.layer_graphs.run(self, hidden_states, layout, wanted, num_layers)
        if found is not None:
            output, kept = found
        else:
            output, kept, attentions = self.run_layers(
                hidden_states, layout, wanted, output_attentions, num_layers
            )
        kept = {i: x if x.dim() == 3 else layout.unpack(x) for i, x in kept.items()}
        return output, kept, attentions

    def run_layers(
        self,
        hidden_states: Tensor,
        layout: PackedBatch,
        wanted: set[int],
        output_attentions: bool,
        num_layers: int | None,
    ) -> tuple[Tensor, dict[int, Tensor], list[Tensor]]:
        """`forward`, operation by operation.

        The kept hidden states are as `_kept` gives them.

        In evaluation on the Triton kernels the host does not wait for the device, and takes no more
        from `layout` than bounds: a CUDA graph of this may be replayed with other lengths.
        """
        hidden_states = self.dropout(hidden_states)
        positions = None
        if self.embed_positions is not None:
            positions = self.embed_positions(hidden_states, layout)
        kept: dict[int, Tensor] = {}
        if 0 in wanted:
            kept[0], hidden_states = _kept(hidden_states, layout)
        attentions: list[Tensor] = []
        layout, taps = self._once_for_all_layers(hidden_states, layout)
        normed: Tensor | None = None  # the next layer's normalised input, if the last one made it
        stop = self.num_layers if num_layers is None else num_layers
        settings = self.recompute if self.gradient_checkpointing and self.training else None
        plan = LayerPlan(settings, self, stop)
        run_layer = layer_runner(hidden_states, layout)
        layers = list(islice(self.layers, stop))
        for index, layer in enumerate(layers, start=1):
            drops = self.training and self.config.layerdrop > 0.0
            drop = drops and torch.rand(()).item() < self.config.layerdrop
            if not drop:
                arguments = (hidden_states, layout, positions, output_attentions)
                if plan.takes_apart(index) and is_untouched(layer, Wav2Vec2BertEncoderLayer):
                    returned = index in wanted and torch.is_grad_enabled()
                    # LayerDrop may leave out the one that follows.
                    alone = returned or drops or not plan.takes_apart(index + 1)
                    following = None if alone or index == stop else layers[index]
                    if not (following and is_untouched(following, Wav2Vec2BertEncoderLayer)):
                        following = None
                    hidden_states, normed, probabilities = run_layer(
                        layer,
                        hidden_states,
                        layer.open(hidden_states) if normed is None else normed,
                        *arguments[1:],
                        taps=None if taps is None else taps[index - 1],
                        next_layer=following,
                        run_attention=plan.run_attention(index),
                    )
                else:
                    result = plan.run(index, layer, *arguments)
                    # A hook or a caller's own layer may give the hidden states alone.
                    is_bare = isinstance(result, Tensor)
                    hidden_states, probabilities = (result, None) if is_bare else result
                if output_attentions and probabilities is not None:
                    attentions.append(probabilities)
            if index in wanted:
                kept[index], hidden_states = _kept(hidden_states, layout)
        return hidden_states, kept, attentions

    def _once_for_all_layers(
        self, x: Tensor, layout: PackedBatch
    ) -> tuple[PackedBatch, list[Tensor] | None]:
        """`shared_by_layers`, where there is a Triton kernel and something to share."""
        if not self.use_fast_kernels or not on_triton_device(x):
            return layout, None
        layers = [layer for layer in self.layers if is_untouched(layer, Wav2Vec2BertEncoderLayer)]
        if not layers:
            return layout, None
        shared = shared_by_layers(x, layout, layers)
        return shared if len(layers) == len(self.layers) else (shared[0], None)


def shared_by_layers(
    x: Tensor, layout: PackedBatch, layers: Sequence[Any]
) -> tuple[PackedBatch, list[Tensor] | None]:
    """What the Triton kernels of all layers share.

    Args:
        x: `[N, C]`, what enters the first layer.
        layout: the utterances.
        layers: at least one, each with the parts of `Wav2Vec2BertEncoderLayer`.

    Returns:
        The layout with the attention's work list, and the depthwise weights `[C, K]` laid out tap
        by tap; `None` where they differ in shape or are trained.
    """
    tile_map = ops.attention_tile_map(
        x, layers[0].self_attn.head_size, layout.cu_seqlens, layout.max_seqlen, fast=True
    )
    taps = None
    if not torch.is_grad_enabled() or not any(
        layer.conv_module.depthwise_conv.weight.requires_grad for layer in layers
    ):
        weights = [layer.conv_module.depthwise_weight() for layer in layers]
        if all(weight.shape == weights[0].shape for weight in weights):
            taps = ops.tap_major(weights)
    return replace(layout, tile_map=tile_map), taps


def _kept(x: Tensor, layout: PackedBatch) -> tuple[Tensor, Tensor]:
    """A hidden state `[N, C]` in the form that is kept, and in that of the next operation.

    Where a gradient is recorded, the first is padded as a caller is given it, `[batch, T, C]`, and
    the second is packed out of it: the output's gradient reaches only what lies on the way to the
    output. Else both are `x`.
    """
    if not records_gradient(x):
        return x, x
    padded = layout.unpack(x)
    return padded, layout.pack(padded)
