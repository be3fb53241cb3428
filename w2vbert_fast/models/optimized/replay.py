"""A layer as one sequence of launches: recorded once, repeated with other addresses.

Between the launches of a layer lie its modules, their attributes, the choice of operations and the
plans of fourteen launchers, all of which come to the same for the next layer and the next batch of
this size. So the launches, and PyTorch's operations between them, are kept by all that they depend
on (`csrc_triton.script`):

* of the layer everything that its modules hold: classes, attributes, parameters by dtype, device,
  shape, strides, alignment and which of them follow each other in memory. Hooks, other classes
  (LoRA, quantisation, wrappers) and buffers have no place in that: such a layer is not repeated;
* of the call the tensors, likewise, and the length of the longest utterance;
* what `csrc_triton.plans` assumes anyhow.

All of it is compared at each call. Layers that are alike share what was recorded, for a parameter
is an address among others. Positions that are plain PyTorch run as they always did, and so does
everything that is watched.

Where gradients are recorded, a layer is one function of autograd, and the launches of its gradient
are another sequence (`ops.repeated`). Which parameters require a gradient, the probabilities of
dropout, and what autocast casts to are among what is compared. Where what is kept for the backward
pass is packed or computed again, all is as it always was; and so it is under autocast without
gradients, where a weight may be cast once for many calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain, count
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast.layout import PackedBatch
from w2vbert_fast.models.layers import Wav2Vec2BertEncoderLayer, has_global_hooks, is_touched
from w2vbert_fast.models.optimized.graphs import KNOWN_MODULES
from w2vbert_fast.ops.dispatch import runs_triton
from w2vbert_fast.ops.operation import is_watched
from w2vbert_fast.ops.repeated import repeated, repeated_with_gradient

_EMPTY = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    "_buffers",
)

# Functions in C, as they are asked for every parameter at every call.
_ADDRESS, _STRIDES = Tensor.data_ptr, Tensor.stride
_KIND = attrgetter("dtype", "shape", "requires_grad")

Layer = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""`Wav2Vec2BertEncoderLayer.from_normed`, with the layer in front."""


def layer_runner(x: Tensor, layout: PackedBatch) -> Layer:
    """What runs the layers of a forward pass, by recorded launches where that can be.

    Args:
        x: `[N, C]`, what enters the first layer.
        layout: the utterances, with the attention's work list.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if (
        is_watched((x,))
        or (autocast and not torch.is_grad_enabled())
        or has_global_hooks()
        or not runs_triton(x)
        # As around what is to be computed again.
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        return Wav2Vec2BertEncoderLayer.from_normed
    return _Replays(layout, str(torch.get_autocast_dtype(device)) if autocast else "")


class _Replays:
    """The layers of one forward pass."""

    def __init__(self, layout: PackedBatch, autocast: str) -> None:
        self._layout = (layout.cu_seqlens, layout.seqused_k, layout.tile_map)
        self._called = (layout.max_seqlen, autocast)

    def __call__(
        self,
        layer: Wav2Vec2BertEncoderLayer,
        hidden_states: Tensor,
        normed: Tensor,
        *arguments: Any,
        taps: Tensor | None,
        next_layer: Wav2Vec2BertEncoderLayer | None,
        run_attention: Callable[..., Any] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `from_normed`."""

        def run(*inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
            following = {"next_layer": next_layer, "run_attention": run_attention}
            return layer.from_normed(*inputs, *arguments, taps=taps, **following)  # type: ignore[arg-type]

        def results(*inputs: Tensor) -> list[Tensor]:
            return [tensor for tensor in run(*inputs) if tensor is not None]

        inputs = (hidden_states, normed)
        state = _state_of(layer)
        norm = None if next_layer is None else next_layer._modules["ffn1_layer_norm"]
        special = (run_attention, *arguments[1:])  # positions and whether to return attention maps
        if state is None or any(special) or type(norm) not in (nn.LayerNorm, type(None)):
            return run(*inputs)
        border: tuple[Any, ...] = (None, None, None)
        if norm is not None:
            border = (*norm._parameters.values(), norm.eps)
        others = (taps, *self._layout, *border[:2])
        values = (border[2], *self._called, state.number)
        made: Sequence[Tensor]
        if torch.is_grad_enabled():
            made = repeated_with_gradient(results, inputs, others, values, state.parameters)
        else:
            tensors = (*inputs, *others)
            made = repeated(
                lambda: results(*inputs), tensors, values, state.parameters, state.addresses
            )
        return made[0], made[1] if len(made) > 1 else None, None


class _State:
    """All that a layer's modules hold.

    Attributes:
        number: the same for layers that are alike; `None` where a layer has what is not known.
        parameters: of all modules, in order, `None` where one has none.
        addresses: of the parameters, 0 for `None`.
    """

    def __init__(self, layer: nn.Module) -> None:
        # But for the layer, which this must not keep alive; its caller knows its class.
        self._modules = [module for module in layer.modules() if module is not layer]
        self._kinds = [type(module) for module in self._modules]
        self._own = [vars(layer), *map(vars, self._modules)]
        # Each module's attributes, then its children; dictionaries among them by identity.
        self._compared = [*self._own, *[own["_modules"] for own in self._own if own["_modules"]]]
        self._values = _values(self._compared)
        self._mostly_empty = [own[name] for own in self._own for name in _EMPTY]
        self._has_hooks = any(self._mostly_empty)
        self._parameters = [own["_parameters"] for own in self._own if own["_parameters"]]
        self.parameters = _values(self._parameters)
        self.addresses = [0 if p is None else p.data_ptr() for p in self.parameters]
        self._present = [p for p in self.parameters if p is not None]
        self._starts = [*map(_ADDRESS, self._present)]
        # What is equal is one object for all layers: less memory to read at every call.
        self._described = [_EQUAL.setdefault(value, value) for value in self._describe()]
        self.number = self._number()

    def holds(self) -> bool:
        """Whether it is all as it was."""
        try:
            parameters = _values(self._parameters)
            return (
                any(self._mostly_empty) is self._has_hooks
                and [*map(type, self._modules)] == self._kinds
                and _values(self._compared) == self._values
                and len(parameters) == len(self.parameters)
                and all(map(is_, parameters, self.parameters))
                and [*map(_ADDRESS, self._present)] == self._starts
                and self._describe() == self._described
            )
        except RuntimeError:  # a tensor where there was none has no truth value
            return False

    def _describe(self) -> list[Any]:
        return [*map(_KIND, self._present), *map(_STRIDES, self._present)]

    def _number(self) -> int | None:
        """Of what is alike; see `number`."""
        kinds = {type(parameter) for parameter in self.parameters}
        known = kinds <= {nn.Parameter, type(None)} and KNOWN_MODULES.issuperset(self._kinds)
        if not known or self._has_hooks or any(map(is_touched, self._modules)):
            return None
        attributes = []
        for own in self._own:
            for name, value in own.items():
                if isinstance(value, Tensor):
                    return None
                if isinstance(value, dict | set):
                    value = tuple(value) if name in ("_modules", "_parameters") else ()
                attributes.append((name, tuple(value) if isinstance(value, list) else value))
        starts = {address: place for place, address in enumerate(self.addresses)}
        parameters: list[tuple[Any, ...]] = []
        for p in self.parameters:
            if p is not None:
                storage = p.untyped_storage()
                following = starts.get(p.data_ptr() + p.nbytes)
                other = None if following is None else self.parameters[following]
                if other is None or other.untyped_storage().data_ptr() != storage.data_ptr():
                    following = None
                kind = (p.dtype, p.device, p.shape, p.stride(), p.data_ptr() & 15, p.requires_grad)
                parameters.append((*kind, storage.nbytes() < 2**31, following))
            else:
                parameters.append(())
        try:
            signature = (tuple(self._kinds), tuple(attributes), tuple(parameters))
            return _NUMBERS.setdefault(signature, next(_COUNT))  # unique in threads, too
        except TypeError:  # an attribute that has no hash
            return None


def _values(owners: Sequence[dict[str, Any]]) -> list[Any]:
    return [*chain.from_iterable(map(dict.values, owners))]


_EQUAL: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_NUMBERS: dict[tuple[Any, ...], int] = {}
_COUNT = count()
_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()


def _state_of(layer: nn.Module) -> _State | None:
    """A layer's state as it is now; `None` where the layer is not to be repeated."""
    state = _STATES.get(layer)
    if state is None or not state.holds():
        state = _STATES[layer] = _State(layer)
    return None if state.number is None else state
