"""Initial values of the parameters, drawn from the reference's distributions.

A module of this package that holds parameters itself says in `INITIAL` how each of them begins: a
function that draws it in place.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from w2vbert_fast.models.layers import Wav2Vec2BertFeatureProjection


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

    Raises:
        ValueError: a module of this package does not say how a parameter begins.
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
    draw = getattr(module, "INITIAL", {}).get(name)
    if draw is not None:
        draw(parameter)
    elif isinstance(module, nn.LayerNorm):
        parameter.fill_(1.0 if name == "weight" else 0.0)
    elif isinstance(module, nn.Linear) and uniform:
        bound = math.sqrt(1.0 / module.in_features)
        parameter.uniform_(-bound, bound)
    elif isinstance(module, nn.Linear) and name == "bias":
        parameter.zero_()
    elif isinstance(module, nn.Linear | nn.Embedding) and name == "weight":
        parameter.normal_(0.0, std)
    elif isinstance(module, nn.Conv1d) and name == "weight":
        nn.init.kaiming_normal_(parameter)
    elif isinstance(module, nn.Conv1d) and name == "bias":
        bound = math.sqrt(module.groups / (module.in_channels * module.kernel_size[0]))
        parameter.uniform_(-bound, bound)
    elif type(module).__module__.startswith(f"{__package__}."):
        raise ValueError(
            f"{type(module).__name__}.INITIAL does not say how its parameter {name!r} begins"
        )
