"""Calls of the registered operations, as several tests make and compare them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from w2vbert_fast import ops
from w2vbert_fast.ops.dispatch import force
from w2vbert_fast.ops.examples import Sizes, example
from w2vbert_fast.ops.operation import OPERATIONS

SMALL = Sizes(
    lengths=(5, 0, 19),
    width=48,
    inner=80,
    heads=2,
    head_size=16,
    left=64,
    right=8,
    taps=31,
    vocabulary=32,
)
"""An empty utterance, and rows that fill no tile."""

OF_WAVEFORMS = {"log_mel_filterbank": 2e-3, "normalize_and_stack": 1e-5}
"""Operations in float32 alone, and by how much they may be off."""

WITH_KERNELS = sorted(OPERATIONS.keys() - {"attention_tile_map"})
"""Operations that launch kernels. Work lists do not, and attention makes its own."""


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of results."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def in_float64(tree: Any) -> Any:
    """Arguments with floating-point tensors in float64."""
    return torch.utils._pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )


def arguments(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Any, ...]:
    """Arguments of a registered operation. A gradient takes what the forward operation gives as it
    runs then: the log-sum-exp of plain bf16 is rounded."""
    with torch.no_grad():
        first, *others = example(name, sizes, dtype=dtype, device=device)
    if name == "ctc_greedy":  # the first of equal logits counts, and -0 is equal to 0
        first = first.round()
        first[::2] = -first[::2].abs()
    return first, *others


def answers(name: str, given: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """An operation's results by plain PyTorch: in the dtype of its arguments, and in float64. Of
    waveforms the first are both."""
    operation = getattr(torch.ops.w2vbert, name)
    with torch.no_grad(), force("plain"):
        plain = leaves(operation(*given))
        if name in OF_WAVEFORMS:
            return plain, plain
        return plain, leaves(operation(*in_float64(given)))


def plain_form(name: str) -> Callable[..., Any]:
    """An operation's plain form with the arguments of the registered one."""
    if name != "shaw_attention":
        form: Callable[..., Any] = getattr(ops, name)
        return form

    def attend(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, *rest: Any) -> Tensor:
        names = ("distance_embedding", "left_max_position", "right_max_position")
        return ops.shaw_attention(q, k, v, cu, longest, **dict(zip(names, rest, strict=True)))[0]

    return attend


def let_all_matter(model: nn.Module) -> None:
    """Weights larger than the usual initial ones: attention, positions and biases all matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() <= 1 or "pos_bias" in name or "embedding" in name:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
