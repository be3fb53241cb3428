"""The forward pass over padded tensors, for graphs that are exported.

The models run packed: how many tokens there are depends on the mask's values, which the graph of an
ONNX or AOTInductor file would have to carry along as data-dependent shapes. Here every activation
is `[batch, T, ...]` and masks keep padding out. What works on single frames (norms, projections,
feed-forward blocks) is done by the model's own modules; attention, the depthwise convolution, the
adapter's convolutions and pooling, which look at several frames, are restated. Answers are those
of the packed model, to rounding; in padded frames too.

Shapes: C hidden, H heads of D channels, T frames. `mask` is bool `[batch, T]`, valid frames of a
row contiguous, which a graph cannot check; `tokens` is `mask` with the half frames (`layout`),
which are computed like any other frame, but are no keys and zero into the convolution.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast import ops
from w2vbert_fast.layout import half_frames
from w2vbert_fast.models.adapter import Wav2Vec2BertAdapter, Wav2Vec2BertAdapterLayer
from w2vbert_fast.models.encoder import Wav2Vec2BertEncoder
from w2vbert_fast.models.layers import (
    Wav2Vec2BertConvolutionModule,
    Wav2Vec2BertEncoderLayer,
    Wav2Vec2BertSelfAttention,
    apply_linear,
)
from w2vbert_fast.models.model import Wav2Vec2BertModel
from w2vbert_fast.models.pooling import left_aligned


def encode(
    model: Wav2Vec2BertModel, input_features: Tensor, mask: Tensor, num_layers: int
) -> list[Tensor]:
    """The hidden states 0 to `num_layers`, `[batch, T, C]` each; padding holds anything finite.

    Args:
        model: in evaluation mode, `use_fast_kernels` off.
        input_features: `[batch, T, feature_projection_input_dim]`; padding may hold anything.
        mask: bool `[batch, T]`.
        num_layers: how many layers run.
    """
    padding = ~mask[..., None]
    x, _ = model.feature_projection(input_features.masked_fill(padding, 0.0))
    x = x.masked_fill(padding, 0.0)
    tables = _position_tables(model.encoder, x, mask)
    states = [x]
    for index in range(num_layers):
        layer = model.encoder.layers[index]
        assert isinstance(layer, Wav2Vec2BertEncoderLayer)
        x = _layer(layer, x, mask, tables)
        states.append(x)
    return states


def tokens_of(input_features: Tensor, mask: Tensor) -> Tensor:
    """Valid and half frames, bool `[batch, T]`.

    Args:
        input_features: `[batch, T, feature_projection_input_dim]`.
        mask: bool `[batch, T]`.
    """
    frames = torch.arange(mask.shape[1], device=mask.device)
    behind = mask.to(torch.int64).argmax(1) + mask.sum(1)
    is_half = half_frames(input_features, mask)
    return mask | ((frames == behind[:, None]) & is_half[:, None])


def finish(
    model: Wav2Vec2BertModel, x: Tensor, mask: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model does behind its layers: feed-forward block and adapter, where it has them.

    Args:
        model: the model.
        x: `[batch, T, C]`, the last hidden state.
        mask: bool `[batch, T]`.
        tokens: bool `[batch, T]`.

    Returns:
        `[batch, T', C']`, its mask and its tokens `[batch, T']`, right-padded behind an adapter.
    """
    if model.intermediate_ffn is not None:
        x = x + 0.5 * model.intermediate_ffn(x)
    if model.adapter is not None:
        x, mask, tokens = _adapter(model.adapter, x, mask, tokens)
    return x, mask, tokens


def _layer(
    layer: Wav2Vec2BertEncoderLayer, x: Tensor, mask: Tensor, tables: tuple[Tensor, ...]
) -> Tensor:
    x = x + 0.5 * layer.ffn1(layer.ffn1_layer_norm(x))
    x = x + _attention(layer.self_attn, layer.self_attn_layer_norm(x), mask, tables)
    x = x + _convolution(layer.conv_module, layer.conv_module.layer_norm(x), mask)
    x = x + 0.5 * layer.ffn2(layer.ffn2_layer_norm(x))
    y: Tensor = layer.final_layer_norm(x)
    return y


def _position_tables(encoder: Wav2Vec2BertEncoder, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """What the layers' attention shares.

    Rotary: cosines and sines `[batch, T, 1, D]`, counted from an utterance's first frame. Relative:
    sinusoids `[2 T, C]` of the distances i - j = T - 1 down to -T.
    """
    config = encoder.config
    device, dtype = x.device, x.dtype
    if config.position_embeddings_type == "rotary":
        dim = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, dim, 2, device=device).float() / dim
        start = mask.to(torch.int64).argmax(1, keepdim=True)
        time = (torch.arange(x.shape[1], device=device) - start).clamp(min=0).float()
        angles = time[..., None] * (1.0 / config.rotary_embedding_base**exponents)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)
    if config.position_embeddings_type == "relative":
        frames = x.shape[1]
        distance = (frames - 1 - torch.arange(2 * frames, device=device)).float()
        channels = torch.arange(0, config.hidden_size, 2, device=device).float()
        step = -(math.log(10000.0) / config.hidden_size)
        angles = distance[:, None] * torch.exp(channels * step)
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        return (table[:, : config.hidden_size].to(dtype),)
    return ()


def _attention(
    module: Wav2Vec2BertSelfAttention, x: Tensor, mask: Tensor, tables: tuple[Tensor, ...]
) -> Tensor:
    """`[batch, T, C]`, normalised -> `[batch, T, C]`."""
    kind = module.position_embeddings_type
    by_head = (module.num_heads, module.head_size)
    query_key_input = x
    if kind == "rotary":
        cos, sin = tables
        heads = x.view(*x.shape[:2], *by_head)
        first, second = heads.chunk(2, dim=-1)
        heads = heads * cos + torch.cat((-second, first), dim=-1) * sin
        query_key_input = heads.flatten(2)
    projected = (
        apply_linear(module.linear_q, query_key_input),
        apply_linear(module.linear_k, query_key_input),
        apply_linear(module.linear_v, x),
    )
    shape = (*x.shape[:2], *by_head)
    q, k, v = (part.view(shape).transpose(1, 2) for part in projected)  # [batch, H, T, D]
    frames = x.shape[1]
    if kind == "relative_key":
        left, right = module.left_max_position_embeddings, module.right_max_position_embeddings
        distance = torch.arange(2 * frames, device=x.device) - (frames - 1)
        vectors = module.distance_embedding.weight[distance.clamp(-left, right) + left]
        scores = q @ k.transpose(-1, -2) + _by_pair(q @ vectors.to(q.dtype).t())
    elif kind == "relative":
        keys = apply_linear(module.linear_pos, tables[0]).view(-1, *by_head)  # [2 T, H, D]
        scores = (q + module.pos_bias_u[:, None]) @ k.transpose(-1, -2)
        scores = scores + _by_pair((q + module.pos_bias_v[:, None]) @ keys.permute(1, 2, 0))
    else:
        scores = q @ k.transpose(-1, -2)
    scores = scores * module.head_size**-0.5
    # The lowest finite number, not -inf: a row without valid frames must not give NaN.
    scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    output = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
    return apply_linear(module.linear_out, output)


def _by_pair(by_distance: Tensor) -> Tensor:
    """Scores by distance to scores by pair: `[batch, H, T, 2 T]` -> `[batch, H, T, T]`.

    Column c of row i belongs to the distance j - i = c - (T - 1), so that the wanted entries of
    successive rows lie 2 T - 1 apart in memory: no index tensor is needed (Dai et al. 2019).
    """
    frames = by_distance.shape[2]
    flat = by_distance.flatten(2)[..., frames - 1 : frames - 1 + frames * (2 * frames - 1)]
    return flat.view(*flat.shape[:2], frames, 2 * frames - 1)[..., :frames]


def _convolution(module: Wav2Vec2BertConvolutionModule, x: Tensor, mask: Tensor) -> Tensor:
    """`[batch, T, C]`, normalised -> `[batch, T, C]`."""
    x = ops.linear_glu(x, module.pointwise_conv1.weight.squeeze(-1))
    x = x.masked_fill(~mask[..., None], 0.0).transpose(1, 2)  # [batch, C, T]
    weight = module.depthwise_conv.weight
    x = F.conv1d(F.pad(x, (weight.shape[-1] - 1, 0)), weight, groups=weight.shape[0])
    x = module.depthwise_layer_norm(x.transpose(1, 2))
    x = ops.get_activation(module.activation)(x)
    return ops.linear(x, module.pointwise_conv2.weight.squeeze(-1))


def _adapter(
    adapter: Wav2Vec2BertAdapter, x: Tensor, mask: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if adapter.proj is not None and adapter.proj_layer_norm is not None:
        x = adapter.proj_layer_norm(apply_linear(adapter.proj, x))
    x, lengths = left_aligned(x, tokens)
    valid_lengths = mask.sum(1)
    for layer in adapter.layers:
        assert isinstance(layer, Wav2Vec2BertAdapterLayer)
        x, lengths, valid_lengths = _adapter_layer(layer, x, lengths, valid_lengths)
    return x, _first_frames(x, valid_lengths), _first_frames(x, lengths)


def _first_frames(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


def _adapter_layer(
    layer: Wav2Vec2BertAdapterLayer, x: Tensor, lengths: Tensor, valid_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`[batch, T, C']`, right-padded, int64 numbers of tokens and of valid frames `[batch]` -> the
    same, shortened."""
    tokens = _first_frames(x, lengths)[..., None]

    def conv_glu(padded: Tensor, conv: torch.nn.Conv1d) -> Tensor:
        convolved = conv(padded.masked_fill(~tokens, 0.0).transpose(1, 2))
        # Contiguous, or torch.export cannot prove that the projections may flatten it.
        return F.glu(convolved, dim=1).transpose(1, 2).contiguous()

    def shortened(counts: Tensor) -> Tensor:
        shorter = counts + 2 * (layer.stride // 2) - layer.kernel_size
        shorter = torch.div(shorter, layer.stride, rounding_mode="floor") + 1
        return shorter.clamp(min=0)

    residual = conv_glu(layer.residual_layer_norm(x), layer.residual_conv)
    x = conv_glu(layer.self_attn_layer_norm(x), layer.self_attn_conv)
    valid_lengths = torch.where(valid_lengths > 0, shortened(valid_lengths), 0)
    lengths = torch.where(valid_lengths > 0, shortened(lengths), 0)
    residual = residual + _attention(layer.self_attn, x, _first_frames(x, valid_lengths), ())
    y: Tensor = residual + layer.ffn(layer.ffn_layer_norm(residual))
    return y, lengths, valid_lengths
