"""Which layers compute their activations again in the backward pass, and which keep them.

Chen et al. 2016 (sublinear memory). Recomputing gives the same bits as keeping: it runs the same
operations with the same random numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from w2vbert_fast.models.layers import Wav2Vec2BertEncoderLayer

Policy = Literal["none", "layer", "attention", "auto"]
"""What is computed again: nothing, each layer, each layer's attention module, or as much as needed.
"""
LayerPolicy = Literal["none", "layer", "attention"]

_CHECKPOINT_OPTIONS = frozenset(
    {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
)
_SHARE = 0.9
"""Of the memory that is left, what "auto" gives to the layers."""


@dataclass
class Recompute:
    """A policy, and what it is carried out with: arguments of `gradient_checkpointing_enable`,
    which says what they mean and what is an error.

    Attributes:
        options: arguments of `torch.utils.checkpoint.checkpoint`.
    """

    policy: Policy = "layer"
    budget_bytes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    every_n_layers: int = 1

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            names = ", ".join(map(repr, get_args(Policy)))
            raise ValueError(f"policy is {self.policy!r}; it must be one of {names}")
        for name in ("budget_bytes", "every_n_layers"):
            value = getattr(self, name)
            if value is None and name == "budget_bytes":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; it must be an integer")
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.budget_bytes is not None and self.policy != "auto":
            raise ValueError(
                f"budget_bytes is {self.budget_bytes} and policy is {self.policy!r}; only 'auto' "
                "has a budget"
            )
        unknown = sorted(set(self.options) - _CHECKPOINT_OPTIONS)
        if unknown:
            raise ValueError(
                f"gradient_checkpointing_kwargs has {', '.join(map(repr, unknown))}; it may have "
                f"{', '.join(sorted(_CHECKPOINT_OPTIONS))}"
            )
        self.options = {"use_reentrant": False, **self.options}
        self._has_stepped = False

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`, of which only the arguments are kept."""
        return checkpoint(function, *arguments, **self.options)

    def budget(self, model: nn.Module, device: torch.device) -> int:
        """Bytes that the layers still to come may keep, for "auto".

        Of the device's free memory, less what gradients and the moments of Adam will take where
        they are not there yet, nine tenths. Whether the moments are there nobody can ask: the
        second time that no parameter has a gradient, an optimiser has been through.

        Raises:
            ValueError: the device does not tell how much memory is free.
        """
        if self.budget_bytes is not None:
            return self.budget_bytes
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        missing = sum(parameter.nbytes for parameter in trained if parameter.grad is None)
        moments = 0 if self._has_stepped else 2 * sum(parameter.nbytes for parameter in trained)
        self._has_stepped |= missing > 0
        return max(0, int(_SHARE * (free_memory(device) - missing - moments)))


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on a device may still take.

    Raises:
        ValueError: the device does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(
        f"{device} does not tell how much of its memory is free; the policy 'auto' needs "
        "budget_bytes there"
    )


class LayerPlan:
    """What the layers of one forward pass recompute, and how each is run.

    For "auto" the first layer that runs keeps all, and what it keeps decides about the others. Code
    that is being compiled cannot count that: it recomputes each layer.

    Args:
        settings: how to recompute; `None`: nothing is.
        model: the module whose parameters are trained.
        layers: how many there are.
    """

    def __init__(self, settings: Recompute | None, model: nn.Module, layers: int) -> None:
        self._settings = settings
        self._model = model
        self._layers = layers
        policy: Policy = "none" if settings is None else settings.policy
        if policy == "auto" and torch.compiler.is_compiling():
            policy = "layer"
        self._policies: list[LayerPolicy] | None = None
        if policy != "auto":
            step = 1 if settings is None else settings.every_n_layers
            self._policies = [policy if i % step == 0 else "none" for i in range(layers)]

    def takes_apart(self, index: int) -> bool:
        """Whether the `index`-th layer, from 1, may share operations with its neighbours."""
        if self._policies is None:
            return False
        return index > self._layers or self._policies[index - 1] != "layer"

    def run_attention(self, index: int) -> Callable[..., Any] | None:
        """What runs the attention module of the `index`-th layer; `None`: nothing special."""
        if self._settings is None or self._policies is None:
            return None
        return self._settings.run if self._policies[index - 1] == "attention" else None

    def run(self, index: int, layer: nn.Module, x: Tensor, *arguments: Any) -> Any:
        """The `index`-th layer's outputs for its input and further arguments."""
        if self._settings is not None and self._policies is None:
            return self._run_and_choose(self._settings, index, layer, x, *arguments)
        if not self.takes_apart(index) and self._settings is not None:
            return self._settings.run(layer, x, *arguments)
        run = self.run_attention(index)
        return layer(x, *arguments, **_attention_option(layer, run))

    def _run_and_choose(
        self, settings: Recompute, index: int, layer: nn.Module, x: Tensor, *arguments: Any
    ) -> Any:
        saved = SavedBytes(layer)
        with saved.hooks():
            result = layer(x, *arguments, **_attention_option(layer, saved.attention))
        budget = settings.budget(self._model, x.device)
        rest = self._layers - index
        sizes = (saved.total, saved.in_attention, x.nbytes)
        self._policies = [*["none"] * index, *layer_policies(rest, *sizes, budget)]  # type: ignore[list-item]
        return result


def _attention_option(layer: nn.Module, run: Callable[..., Any] | None) -> dict[str, Any]:
    """The argument for a layer that has it: others put in its place may not."""
    return {"run_attention": run} if isinstance(layer, Wav2Vec2BertEncoderLayer) else {}


class SavedBytes:
    """Counts what autograd keeps of a layer: bytes of the storages that it saves, each once.

    Args:
        module: the layer; its parameters do not count.
    """

    def __init__(self, module: nn.Module) -> None:
        self.total = 0
        self.in_attention = 0
        self._seen = {_storage(tensor) for tensor in module.parameters()}
        self._inside = False

    def hooks(self) -> Any:
        """The context in which to run the layer."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def attention(self, module: nn.Module, x: Tensor, *arguments: Any) -> Any:
        """Runs the attention module. What it saves counts as the attention's, except `x`."""
        self._keep(x)
        self._inside = True
        try:
            return module(x, *arguments)
        finally:
            self._inside = False

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            size = tensor.untyped_storage().nbytes()
            self.total += size
            self.in_attention += size if self._inside else 0
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def layer_policies(
    layers: int, layer_bytes: int, attention_bytes: int, input_bytes: int, budget: int
) -> list[LayerPolicy]:
    """What each of several equal layers recomputes, so that they keep at most `budget` bytes.

    As little as possible: nothing; else the attention of as few layers as will do; else as few
    whole layers as will do, and the attention of the others. The first layers recompute, because
    theirs is the end of the backward pass, when the others' activations are gone. A budget that
    is too small for whole layers is exceeded.

    Args:
        layers: how many.
        layer_bytes: what a layer keeps for the backward pass.
        attention_bytes: how much of it its attention module keeps.
        input_bytes: a layer's input, from which it is computed again.
        budget: in bytes; it includes what recomputing one part takes for a while.
    """
    whole = layers * layer_bytes
    if whole <= budget:
        return ["none"] * layers
    if attention_bytes > 0:
        count = -(-(whole + attention_bytes - budget) // attention_bytes)
        if count <= layers:
            return [*["attention"] * count, *["none"] * (layers - count)]  # type: ignore[list-item]
    rest = layer_bytes - attention_bytes
    saving = max(rest - input_bytes, 1)
    count = min(layers, -(-(layers * rest + layer_bytes - budget) // saving))
    return [*["layer"] * count, *["attention"] * (layers - count)]  # type: ignore[list-item]
