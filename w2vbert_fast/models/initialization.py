"""Initial values of the parameters, drawn from the reference's distributions."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from w2vbert_fast.models.layers import Wav2Vec2BertFeatureProjection, Wav2Vec2BertSelfAttention


@torch.no_grad()
def initialize_weights(
    model: nn.Module, names: Collection[str] | None = None, std: float | None = None
) -> None:
    """Initialise parameters in place.

    What neither the reference nor this package has (a caller's own parameters, a GRU) stays as its
    constructor made it.

    Args:
        model: a model of this package, or one of its modules.
        names: full state-dict names of the parameters to set; `None` for all. Naming a few is what
            loading a checkpoint without a head does.
        std: standard deviation of the linear layers; `None`: `initializer_range` of `model.config`.
    """
    if std is None:
        std = float(getattr(getattr(model, "config", None), "initializer_range", 0.02))
    wanted = None if names is None else set(names)
    uniform_projections = {
        id(module.projection)
        for module in model.modules()
        if isinstance(module, Wav2Vec2BertFeatureProjection)
    }
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if wanted is None or name in wanted:
                short = name.rpartition(".")[2]
                _initialize(module, short, parameter, std, id(module) in uniform_projections)


def _initialize(
    module: nn.Module, name: str, parameter: nn.Parameter, std: float, uniform: bool
) -> None:
    if isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Linear) and uniform:
        bound = math.sqrt(1.0 / module.in_features)
        parameter.uniform_(-bound, bound)
    elif isinstance(module, nn.Linear):
        _normal_or_zero(name, parameter, std)
    elif isinstance(module, nn.Conv1d):
        if name == "weight":
            nn.init.kaiming_normal_(parameter)
        else:
            bound = math.sqrt(module.groups / (module.in_channels * module.kernel_size[0]))
            parameter.uniform_(-bound, bound)
    elif isinstance(module, nn.Embedding):
        parameter.normal_(0.0, std)
    elif isinstance(module, Wav2Vec2BertSelfAttention):  # pos_bias_u, pos_bias_v
        nn.init.xavier_uniform_(parameter)
    elif name == "masked_spec_embed":
        parameter.uniform_()
    elif name == "layer_weights":
        parameter.fill_(1.0 / parameter.numel())
    elif type(module).__module__.startswith(f"{__package__}."):  # the AM-softmax prototypes
        parameter.normal_()


def _normal_or_zero(name: str, parameter: nn.Parameter, std: float) -> None:
    if name == "weight":
        parameter.normal_(0.0, std)
    else:
        parameter.zero_()
