"""The Conformer layer of Wav2Vec2-BERT on packed tensors, with the reference's parameter names.

Reference: `Wav2Vec2BertEncoderLayer` and its parts in transformers; Gulati et al. 2020.
Shapes: N packed tokens, C hidden, H heads of D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.configuration import Wav2Vec2BertConfig

_Module = TypeVar("_Module", bound=nn.Module)

Activation = str | Callable[[Tensor], Tensor]
Initial = Mapping[str, Callable[[Tensor], object]]
"""How parameters begin: by name what draws one in place (`initialization`)."""


def apply_linear(
    module: nn.Module, x: Tensor, activation: Activation | None = None, *, fast: bool = False
) -> Tensor:
    """A linear layer through `ops.linear`, or through its own forward when it is no plain
    `nn.Linear`.

    LoRA, quantised and hooked layers keep their behaviour: only an untouched `nn.Linear` may hand
    its weight to an operation.
    """
    if is_untouched(module, nn.Linear):
        return ops.linear(x, module.weight, module.bias, activation, fast=fast)
    y: Tensor = module(x)
    return y if activation is None else ops.get_activation(activation)(y)


def is_untouched(module: nn.Module, kind: type[_Module]) -> TypeGuard[_Module]:
    """Whether a module is of this class, no subclass, and nobody has touched it."""
    return type(module) is kind and not is_touched(module)


def is_touched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: it has hooks, or a `forward` of its
    own (as offloading libraries put in)."""
    own = module.__dict__  # asked often, and attributes take longer
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
    )


def has_global_hooks() -> bool:
    """Whether there are hooks that belong to all modules."""
    registered = nn.modules.module
    return bool(
        registered._global_forward_hooks
        or registered._global_forward_pre_hooks
        or registered._global_backward_hooks
        or registered._global_backward_pre_hooks
    )


def apply_norm(norm: nn.LayerNorm, x: Tensor, *, fast: bool) -> Tensor:
    """A LayerNorm through `ops.layer_norm`."""
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps, fast=fast)


def apply_dropout(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, without the call where it does nothing: outside training, in every layer."""
    if is_untouched(module, nn.Dropout) and not module.training:
        return x
    y: Tensor = module(x)
    return y


class Wav2Vec2BertFeatureProjection(nn.Module):
    """LayerNorm over the stacked mel frames, then a projection to the hidden size."""

    use_fast_kernels = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(
            config.feature_projection_input_dim, eps=config.layer_norm_eps
        )
        self.projection = nn.Linear(config.feature_projection_input_dim, config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, feature_dim]` -> hidden states `[N, C]`, and the features normalised."""
        fast = self.use_fast_kernels
        extract_features = apply_norm(self.layer_norm, features, fast=fast)
        x = apply_linear(self.projection, extract_features, fast=fast)
        return apply_dropout(self.dropout, x), extract_features


class Wav2Vec2BertFeedForward(nn.Module):
    """Linear, activation, linear: `[N, hidden_size]` -> `[N, hidden_size]`."""

    use_fast_kernels = False

    def __init__(
        self,
        config: Wav2Vec2BertConfig,
        act_fn: Activation | None = None,
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        width = config.hidden_size if hidden_size is None else hidden_size
        self.activation = config.hidden_act if act_fn is None else act_fn
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.intermediate_dense = nn.Linear(width, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, width)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        fast = self.use_fast_kernels
        first, second, activation = self.intermediate_dense, self.output_dense, self.activation
        drops = self.training and self.intermediate_dropout.p > 0.0
        plain = is_untouched(first, nn.Linear) and is_untouched(second, nn.Linear)
        if plain and isinstance(activation, str) and not drops:
            weights = (first.weight, first.bias, activation, second.weight, second.bias)
            x = ops.feed_forward(x, *weights, fast=fast)
        else:
            x = apply_dropout(
                self.intermediate_dropout, apply_linear(first, x, activation, fast=fast)
            )
            x = apply_linear(second, x, fast=fast)
        return apply_dropout(self.output_dropout, x)


class Wav2Vec2BertConvolutionModule(nn.Module):
    """Pointwise convolution with GLU, causal depthwise convolution, norm, activation, pointwise.

    The LayerNorm in front (`layer_norm`) is applied by the encoder layer, together with the
    residual.
    """

    use_fast_kernels = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pointwise_conv1 = nn.Conv1d(width, 2 * width, kernel_size=1, bias=False)
        self.depthwise_conv = nn.Conv1d(
            width, width, config.conv_depthwise_kernel_size, groups=width, bias=False
        )
        self.depthwise_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.activation = config.hidden_act
        self.pointwise_conv2 = nn.Conv1d(width, width, kernel_size=1, bias=False)
        self.dropout = nn.Dropout(config.conformer_conv_dropout)

    def depthwise_weight(self) -> Tensor:
        """`[C, K]`, a view."""
        return self.depthwise_conv.weight.squeeze(1)

    def forward(self, x: Tensor, layout: PackedBatch, taps: Tensor | None = None) -> Tensor:
        """`[N, C]`, already normalised -> `[N, C]`.

        `taps` is the depthwise weight `[C, K]` in another layout (`ops.tap_major`).
        """
        fast = self.use_fast_kernels
        x = ops.linear_glu(x, self.pointwise_conv1.weight.squeeze(-1), fast=fast)
        x = depthwise(self, x, layout, taps)
        x = ops.linear(x, self.pointwise_conv2.weight.squeeze(-1), fast=fast)
        return apply_dropout(self.dropout, x)


def depthwise(
    module: Wav2Vec2BertConvolutionModule, x: Tensor, layout: PackedBatch, taps: Tensor | None
) -> Tensor:
    """A convolution module between its pointwise convolutions; arguments as in its `forward`."""
    norm = module.depthwise_layer_norm
    return ops.conv_norm_act(
        x,
        module.depthwise_weight() if taps is None else taps,
        norm.weight,
        norm.bias,
        norm.eps,
        module.activation,
        layout.cu_seqlens,
        layout.seqused_k,
        fast=module.use_fast_kernels,
    )


class Wav2Vec2BertSelfAttention(nn.Module):
    """Multi-head self-attention with the position encoding that the config names.

    The adapter's attention has no positions and works at `output_hidden_size`.
    """

    use_fast_kernels = False
    INITIAL: ClassVar[Initial] = {
        "pos_bias_u": nn.init.xavier_uniform_,
        "pos_bias_v": nn.init.xavier_uniform_,
    }

    def __init__(self, config: Wav2Vec2BertConfig, is_adapter_attention: bool = False) -> None:
        super().__init__()
        width = config.output_hidden_size if is_adapter_attention else config.hidden_size
        assert width is not None
        self.num_heads = config.num_attention_heads
        self.head_size = width // config.num_attention_heads
        self.position_embeddings_type = (
            None if is_adapter_attention else config.position_embeddings_type
        )
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.attention_dropout)
        if self.position_embeddings_type == "relative":
            self.linear_pos = nn.Linear(width, width, bias=False)
            self.pos_bias_u = nn.Parameter(torch.zeros(self.num_heads, self.head_size))
            self.pos_bias_v = nn.Parameter(torch.zeros(self.num_heads, self.head_size))
        if self.position_embeddings_type == "relative_key":
            self.left_max_position_embeddings = config.left_max_position_embeddings
            self.right_max_position_embeddings = config.right_max_position_embeddings
            num_positions = (
                self.left_max_position_embeddings + self.right_max_position_embeddings + 1
            )
            self.distance_embedding = nn.Embedding(num_positions, self.head_size)

    def forward(
        self,
        x: Tensor,
        layout: PackedBatch,
        positions: tuple[Tensor, ...] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each utterance.

        Args:
            x: `[N, C]`, already normalised.
            layout: the utterances.
            positions: what the encoder's `embed_positions` gave: for "rotary" cosines and sines
                `[N, D]` each, for "relative" the sinusoids `[2 T - 1, C]`, else `None`.
            output_attentions: also return the attention maps.

        Returns:
            `[N, C]`, and the maps `[batch, H, T, T]` over `layout.max_seqlen` tokens or `None`.
        """
        by_head = (x.shape[0], self.num_heads, self.head_size)
        query_key_input = x
        if self.position_embeddings_type == "rotary":
            assert positions is not None
            # The reference rotates the input of the projections, not their output.
            query_key_input = ops.rotate(x.view(by_head), *positions).view(x.shape)
        fast = self.use_fast_kernels
        if query_key_input is x:
            projected = self._project(x, self.linear_q, self.linear_k, self.linear_v)
        else:
            projected = self._project(query_key_input, self.linear_q, self.linear_k)
            projected += self._project(x, self.linear_v)
        query, key, value = (part.view(by_head) for part in projected)
        dropout_p = self.dropout.p if self.training else 0.0
        if self.position_embeddings_type == "relative":
            assert positions is not None
            position_keys = apply_linear(self.linear_pos, positions[0])
            output, probabilities = ops.relative_attention(
                query,
                key,
                value,
                layout.cu_seqlens,
                layout.max_seqlen,
                position_keys=position_keys.view(-1, self.num_heads, self.head_size),
                content_bias=self.pos_bias_u,
                position_bias=self.pos_bias_v,
                dropout_p=dropout_p,
                return_probabilities=output_attentions,
                seqused_k=layout.seqused_k,
            )
        else:
            shaw = self.position_embeddings_type == "relative_key"
            output, probabilities = ops.shaw_attention(
                query,
                key,
                value,
                layout.cu_seqlens,
                layout.max_seqlen,
                distance_embedding=self.distance_embedding.weight if shaw else None,
                left_max_position=self.left_max_position_embeddings if shaw else 0,
                right_max_position=self.right_max_position_embeddings if shaw else 0,
                dropout_p=dropout_p,
                return_probabilities=output_attentions,
                tile_map=layout.tile_map,
                seqused_k=layout.seqused_k,
                fast=fast,
            )
        return apply_linear(self.linear_out, output.flatten(1), fast=fast), probabilities

    def _project(self, x: Tensor, *layers: nn.Module) -> list[Tensor]:
        """The output `[N, C]` of each layer for one input."""
        return [apply_linear(layer, x, fast=self.use_fast_kernels) for layer in layers]


class Wav2Vec2BertEncoderLayer(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, norm (Gulati et al. 2020).

    Each block's residual addition and the norm that opens the next block are one operation.
    """

    use_fast_kernels = False

    def __init__(self, config: Wav2Vec2BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.ffn1_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn1 = Wav2Vec2BertFeedForward(config)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn_dropout = nn.Dropout(config.attention_dropout)
        self.self_attn = Wav2Vec2BertSelfAttention(config)
        self.conv_module = Wav2Vec2BertConvolutionModule(config)
        self.ffn2_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ffn2 = Wav2Vec2BertFeedForward(config)
        self.final_layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        layout: PackedBatch,
        positions: tuple[Tensor, ...] | None = None,
        output_attentions: bool = False,
        *,
        run_attention: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`[N, C]` -> `[N, C]` and the attention maps or `None`; arguments as in `from_normed`."""
        x, _, probabilities = self.from_normed(
            hidden_states,
            self.open(hidden_states),
            layout,
            positions,
            output_attentions,
            run_attention=run_attention,
        )
        return x, probabilities

    def open(self, hidden_states: Tensor) -> Tensor:
        """The norm in front of the first block: `[N, C]` -> `[N, C]`."""
        return apply_norm(self.ffn1_layer_norm, hidden_states, fast=self.use_fast_kernels)

    def from_normed(
        self,
        hidden_states: Tensor,
        normed: Tensor,
        layout: PackedBatch,
        positions: tuple[Tensor, ...] | None = None,
        output_attentions: bool = False,
        *,
        taps: Tensor | None = None,
        next_layer: Wav2Vec2BertEncoderLayer | None = None,
        run_attention: Callable[..., Any] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`forward` for an encoder that hands normalised inputs from layer to layer.

        Args:
            hidden_states: `[N, C]`, the layer's input.
            normed: `[N, C]`, what `open` makes of it.
            layout: the utterances.
            positions: as in `Wav2Vec2BertSelfAttention.forward`.
            output_attentions: also return the attention maps.
            taps: as in `Wav2Vec2BertConvolutionModule.forward`.
            next_layer: the layer that follows at once, whose first norm joins this one's last.
            run_attention: called with the attention module and its arguments instead of the module
                itself; it may compute it again in the backward pass.

        Returns:
            The output `[N, C]`; what `next_layer.open` would make of it, `None` without a next
            layer; and the attention maps or `None`.
        """
        residual, x = self._close_block(
            hidden_states, self.ffn1(normed), 0.5, self.self_attn_layer_norm
        )
        if run_attention is None:
            x, probabilities = self.self_attn(x, layout, positions, output_attentions)
        else:
            x, probabilities = run_attention(
                self.self_attn, x, layout, positions, output_attentions
            )
        x = apply_dropout(self.self_attn_dropout, x)
        residual, x = self._close_block(residual, x, 1.0, self.conv_module.layer_norm)
        x = self.conv_module(x, layout, taps)
        residual, x = self._close_block(residual, x, 1.0, self.ffn2_layer_norm)
        x, last = self.ffn2(x), self.final_layer_norm
        if next_layer is None:
            return self._close_block(residual, x, 0.5, last)[1], None, probabilities
        following = next_layer.ffn1_layer_norm
        if following.eps != last.eps:
            x = self._close_block(residual, x, 0.5, last)[1]
            return x, next_layer.open(x), probabilities
        x, normed = ops.residual_double_layer_norm(
            residual,
            x,
            0.5,
            last.weight,
            last.bias,
            following.weight,
            following.bias,
            last.eps,
            fast=self.use_fast_kernels,
        )
        return x, normed, probabilities

    def _close_block(
        self, residual: Tensor, x: Tensor, scale: float, norm: nn.LayerNorm
    ) -> tuple[Tensor, Tensor]:
        weights = (norm.weight, norm.bias, norm.eps)
        return ops.residual_layer_norm(residual, x, scale, *weights, fast=self.use_fast_kernels)
