"""Another library's Conformer modules, as our layers see them.

transformers' modules have our names for their parts (`ffn1`, `self_attn`, `linear_q`, ...). The
classes below give them the attributes that the code in `w2vbert_fast.models` reads besides, and run
that code on them. A view is made for each call and holds nothing but references, so it cannot be
out of date, and there is nothing to move, copy or save.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models import adapter, layers, positions
from w2vbert_fast.models.encoder import shared_by_layers
from w2vbert_fast.models.layers import is_untouched
from w2vbert_fast.models.optimized.stacked import StackedSelfAttention, lay_layers_end_to_end
from w2vbert_fast.ops.dispatch import on_triton_device

_ACTIVATIONS = {
    "ReLU": "relu",
    "SELU": "selu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_new",
}
_OUTPUT_CAPTURE = "transformers.utils.output_capturing"
_HIDDEN_STATES = ("hidden_states", "_hidden_states_layers")


class _Called:
    """A module that is called, whatever it is, and never has its weights read by an operation."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


def _linear(module: Any) -> Any:
    """A plain `nn.Linear` as it is; for quantised weights (tensor subclasses) its call alone."""
    if type(module) is nn.Linear and not has_plain_parameters(module):
        return _Called(module)
    return module


def _activation(module: Any) -> str | Callable[[Tensor], Tensor]:
    """The name of an activation that our operations have inside; of others the module itself."""
    kind = type(module)
    known = kind.__module__.startswith(("torch.nn.", "transformers.")) and is_untouched(
        module, kind
    )
    if known and kind.__name__ in _ACTIVATIONS:
        return _ACTIVATIONS[kind.__name__]
    if known and kind.__name__ == "GELUActivation" and module.act is F.gelu:
        return "gelu"
    called: Callable[[Tensor], Tensor] = module
    return called


class _View:
    """A module as our code reads it: its parts by their names, some of them as something else.

    Args:
        module: the module.
        **own: attributes that no part has, or another value than the part.
    """

    use_fast_kernels = True
    forward: Any

    def __init__(self, module: nn.Module, **own: Any) -> None:
        self.__dict__.update(module._modules, training=module.training, **own)

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class _FeedForward(_View):
    def __init__(self, module: nn.Module) -> None:
        parts: dict[str, Any] = module._modules
        super().__init__(
            module,
            activation=_activation(parts["intermediate_act_fn"]),
            intermediate_dense=_linear(parts["intermediate_dense"]),
            output_dense=_linear(parts["output_dense"]),
        )

    forward: Any = layers.Wav2Vec2BertFeedForward.forward


class _Convolution(_View):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, activation=_activation(module._modules["activation"]))

    depthwise_weight: Any = layers.Wav2Vec2BertConvolutionModule.depthwise_weight
    forward: Any = layers.Wav2Vec2BertConvolutionModule.forward


_OF_ATTENTION = {
    "relative": ("pos_bias_u", "pos_bias_v"),
    "relative_key": ("left_max_position_embeddings", "right_max_position_embeddings"),
}


class _SelfAttention(_View):
    def __init__(self, module: Any) -> None:
        kind = module.position_embeddings_type
        names = ("num_heads", "head_size", *_OF_ATTENTION.get(kind, ()))
        own = {name: getattr(module, name) for name in names}
        for name, part in module._modules.items():
            if name.startswith("linear_"):
                own[name] = _linear(part)
        super().__init__(module, position_embeddings_type=kind, **own)

    def _project(self, x: Tensor, *projections: nn.Module) -> list[Tensor]:
        # Nobody tells when another library's model has been moved or loaded.
        if on_triton_device(x) and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            lay_layers_end_to_end(projections)
        return StackedSelfAttention._project(self, x, *projections)  # type: ignore[arg-type]

    forward: Any = layers.Wav2Vec2BertSelfAttention.forward


class _Layer(_View):
    def __init__(self, module: nn.Module) -> None:
        parts: dict[str, Any] = module._modules
        super().__init__(
            module,
            ffn1=_FeedForward(parts["ffn1"]),
            self_attn=_SelfAttention(parts["self_attn"]),
            conv_module=_Convolution(parts["conv_module"]),
            ffn2=_FeedForward(parts["ffn2"]),
        )

    open: Any = layers.Wav2Vec2BertEncoderLayer.open
    from_normed: Any = layers.Wav2Vec2BertEncoderLayer.from_normed
    _close_block: Any = layers.Wav2Vec2BertEncoderLayer._close_block


class _AdapterLayer(_View):
    def __init__(self, module: Any) -> None:
        super().__init__(
            module,
            kernel_size=module.kernel_size,
            stride=module.stride,
            is_watched=partial(are_watched, module),
            self_attn=_SelfAttention(module._modules["self_attn"]),
            ffn=_FeedForward(module._modules["ffn"]),
        )

    shortened: Any = adapter.Wav2Vec2BertAdapterLayer.shortened
    _conv_glu: Any = adapter.Wav2Vec2BertAdapterLayer._conv_glu
    forward: Any = adapter.Wav2Vec2BertAdapterLayer.forward


_features: ContextVar[tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None] = ContextVar(
    "features", default=None
)


def remember_features(tensor: Tensor, features: Tensor) -> None:
    """Note the mel features of the batch that a tensor belongs to, until the next call.

    transformers hands neither encoder nor adapter the features, by which half frames are known
    (`layout.half_frames`), but hands on the feature projection's output, and then the mask.
    """
    _features.set((weakref.ref(tensor), weakref.ref(features)))


def features_of(*tensors: Tensor | None) -> Tensor | None:
    """The features remembered for any of these very tensors, or `None`."""
    latest = _features.get()
    if latest is None or not any(tensor is latest[0]() for tensor in tensors if tensor is not None):
        return None
    return latest[1]()


class Run:
    """One pass of packed tokens through a reference encoder's layers.

    Args:
        encoder: the reference encoder; `layer_obstacle` has found nothing in its layers.
        x: `[N, C]`, what enters the first layer.
        layout: the utterances.
    """

    def __init__(self, encoder: Any, x: Tensor, layout: PackedBatch) -> None:
        self.layers: list[nn.Module] = list(encoder.layers)
        self.views = [_Layer(layer) for layer in self.layers]
        self.positions = _position_tables(encoder, x, layout)
        self.layout = layout
        self.taps: list[Tensor] | None = None
        if on_triton_device(x) and self.views:
            self.layout, self.taps = shared_by_layers(x, layout, self.views)

    def layer(
        self, index: int, x: Tensor, normed: Tensor | None = None, *, fuse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            index: of the layer.
            x: `[N, C]`, its input.
            normed: `[N, C]`, its normalised input, if the layer in front has made it.
            fuse: also make the next layer's normalised input.

        Returns:
            The output `[N, C]`, and with `fuse` the next layer's `normed`.
        """
        view = self.views[index]
        following = self.views[index + 1] if fuse and index + 1 < len(self.views) else None
        y, next_normed, _ = view.from_normed(
            x,
            view.open(x) if normed is None else normed,
            self.layout,
            self.positions,
            taps=None if self.taps is None else self.taps[index],
            next_layer=following,
        )
        return y, next_normed


def run_adapter(module: Any, x: Tensor, layout: PackedBatch) -> tuple[Tensor, PackedBatch]:
    """A reference adapter (`adapter_obstacle` has found nothing): `[N, C]` -> `[N', C']`."""
    proj, norm = getattr(module, "proj", None), getattr(module, "proj_layer_norm", None)
    if proj is not None and norm is not None:
        x = layers.apply_linear(_linear(proj), x, fast=True)
        x = layers.apply_norm(norm, x, fast=True)
    layout = layout.with_lengths(layout.lengths, layout.padded_length, layout.valid_lengths)
    layerdrop = getattr(module, "layerdrop", 0.0)
    for layer in module.layers:
        if module.training and layerdrop > 0.0 and torch.rand(()).item() <= layerdrop:
            continue
        x, layout = _AdapterLayer(layer)(x, layout)
    return x, layout


def adapter_layout(module: Any, layout: PackedBatch) -> PackedBatch | None:
    """The layout of what a reference adapter makes; `None` where it may leave layers out."""
    if module.training and getattr(module, "layerdrop", 0.0) > 0.0:
        return None
    layout = layout.with_lengths(layout.lengths, layout.padded_length, layout.valid_lengths)
    for layer in module.layers:
        layout = _AdapterLayer.shortened(layer, layout)
    return layout


def unpack_held(packed: Tensor, layout: PackedBatch) -> Tensor:
    """`[num_tokens, C]` -> `[batch, T, C]`; padded frames repeat the nearest frame of their row.

    A head makes the same of a repeated frame, so that greedy CTC decoding, which merges repeats,
    finds nothing in the padding. Rows without frames are zero.
    """
    if layout.token_positions is None:
        return layout.unpack(packed)
    lengths = layout.cu_seqlens.diff().long()[:, None]
    first = layout.cu_seqlens[:-1].long()[:, None]  # the row of each utterance's first frame
    rows = torch.arange(layout.batch_size, device=packed.device)[:, None] * layout.padded_length
    last_token = layout.num_tokens - 1
    if last_token < 0:
        return layout.unpack(packed)
    starts = layout.token_positions[first.clamp(max=last_token)] - rows
    frames = torch.arange(layout.padded_length, device=packed.device)[None, :]
    nearest = torch.minimum((frames - starts).clamp(min=0), lengths - 1).clamp(min=0)
    held = packed[(first + nearest).clamp(max=last_token)]
    return held * (lengths > 0)[:, :, None] if 0 in layout.lengths else held


class _Positions:
    """What the position tables are computed from."""

    def __init__(self, config: Any) -> None:
        self.hidden_size = config.hidden_size
        if config.position_embeddings_type == "rotary":
            self.dim = config.hidden_size // config.num_attention_heads
            self.base = config.rotary_embedding_base

    rotary: Any = positions.Wav2Vec2BertRotaryPositionalEmbedding.forward
    relative: Any = positions.Wav2Vec2BertRelPositionalEmbedding.forward


def _position_tables(encoder: Any, x: Tensor, layout: PackedBatch) -> tuple[Tensor, ...] | None:
    kind = encoder.config.position_embeddings_type
    if kind not in ("rotary", "relative"):
        return None
    tables: tuple[Tensor, ...] = getattr(_Positions(encoder.config), kind)(x, layout)
    return tables


# What may keep the code above from standing in for a reference module.

_LAYER_NORMS = ("ffn1_layer_norm", "self_attn_layer_norm", "ffn2_layer_norm", "final_layer_norm")
_CONVOLUTION_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("layer_norm", nn.LayerNorm),
    ("pointwise_conv1", nn.Conv1d),
    ("glu", nn.GLU),
    ("depthwise_conv", nn.Conv1d),
    ("depthwise_layer_norm", nn.LayerNorm),
    ("pointwise_conv2", nn.Conv1d),
)
_ADAPTER_NORMS = ("residual_layer_norm", "self_attn_layer_norm", "ffn_layer_norm")


def layer_obstacle(layer: Any, classes: dict[str, type[nn.Module]]) -> str | None:
    """What in a reference encoder layer is not what its library made it.

    Replaced parts, parts with hooks, parametrisations or a `forward` of their own, and parameters
    that are tensor subclasses. Not linear layers, activations and the other dropouts, which
    are called as they are, nor the layer itself.

    Args:
        layer: the layer.
        classes: the reference's classes by the name of the part: "feed_forward", "attention",
            "convolution".

    Returns:
        The path of the first such part, or `None`.
    """
    parts: dict[str, Any] = layer._modules
    for name in ("ffn1", "ffn2"):
        if (
            found := _feed_forward_obstacle(parts[name], name, classes["feed_forward"])
        ) is not None:
            return found
    if not _left_alone(parts["conv_module"], classes["convolution"]):
        return "conv_module"
    for name, kind in _CONVOLUTION_PARTS:
        if not _is_plain(parts["conv_module"]._modules[name], kind):
            return f"conv_module.{name}"
    return _attention_obstacle(parts["self_attn"], classes["attention"]) or _first(
        name for name in _LAYER_NORMS if not _is_plain(parts[name], nn.LayerNorm)
    )


def adapter_obstacle(module: Any, classes: dict[str, type[nn.Module]]) -> str | None:
    """`layer_obstacle` for a reference adapter; "adapter_layer" is the class of its layers."""
    norm = getattr(module, "proj_layer_norm", None)
    if norm is not None and not _is_plain(norm, nn.LayerNorm):
        return "proj_layer_norm"
    for index, layer in enumerate(module.layers):
        if not _left_alone(layer, classes["adapter_layer"]):
            return f"layers.{index}"
        parts: dict[str, Any] = layer._modules
        found = _first(name for name in _ADAPTER_NORMS if not _is_plain(parts[name], nn.LayerNorm))
        if found is None and not _is_plain(parts["activation"], nn.GLU):
            found = "activation"
        if found is None:
            found = _feed_forward_obstacle(parts["ffn"], "ffn", classes["feed_forward"])
        if found is None:
            found = _attention_obstacle(parts["self_attn"], classes["attention"])
        if found is not None:
            return f"layers.{index}.{found}"
    return None


def is_watched(layer: nn.Module) -> bool:
    """Whether calling a module does more than its `forward`, at the moment."""
    return not is_untouched(layer, type(layer)) and not _only_capture(layer, ())


def are_watched(*modules: nn.Module) -> bool:
    """Whether somebody sees what goes into these modules or their parts."""
    return not all(_left_alone(part, type(part)) for whole in modules for part in whole.modules())


def has_plain_parameters(module: nn.Module) -> bool:
    """Whether a module's own parameters are what operations read: no quantised, no sharded ones."""
    for parameter in module._parameters.values():
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return False
    return True


def _feed_forward_obstacle(module: Any, name: str, kind: type[nn.Module]) -> str | None:
    if not _left_alone(module, kind):
        return name
    # Left out in evaluation, where one operation is the whole block.
    if not is_untouched(module._modules["intermediate_dropout"], nn.Dropout):
        return f"{name}.intermediate_dropout"
    return None


def _attention_obstacle(module: Any, kind: type[nn.Module]) -> str | None:
    if not _left_alone(module, kind):
        return "self_attn"
    if not has_plain_parameters(module):
        return "self_attn"
    embedding = module._modules.get("distance_embedding")
    if embedding is not None and not _is_plain(embedding, nn.Embedding):
        return "self_attn.distance_embedding"
    return None


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    return is_untouched(module, kind) and has_plain_parameters(module)


def _left_alone(module: nn.Module, kind: type[nn.Module]) -> bool:
    # Hidden states are collected from whole layers.
    return type(module) is kind and (
        is_untouched(module, kind) or _only_capture(module, _HIDDEN_STATES)
    )


def _only_capture(module: nn.Module, besides: tuple[str, ...]) -> bool:
    """Whether all that is attached to a module is transformers' way of collecting outputs, idle.

    transformers 5 leaves hooks on layers and attention modules when hidden states or attention maps
    are asked for the first time. They do nothing in calls that ask for none.

    Args:
        module: the module.
        besides: outputs that may be collected.
    """
    others = (
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
    hooks = module._forward_hooks.values()
    if others or any(getattr(hook, "__module__", None) != _OUTPUT_CAPTURE for hook in hooks):
        return False
    return set(capturing()) <= set(besides)


def capturing() -> dict[str, Any]:
    """What transformers collects in this call by hooks: lists by the name of the output."""
    module = sys.modules.get(_OUTPUT_CAPTURE)
    collected = None if module is None else module._active_collector.get()
    return {} if collected is None else dict(collected)


def _first(names: Iterable[str]) -> str | None:
    return next(iter(names), None)
