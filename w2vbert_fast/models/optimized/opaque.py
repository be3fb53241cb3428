"""What layers and blocks share whose weights are in a form that only a CPU's kernels read."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from w2vbert_fast.models.layers import Wav2Vec2BertFeedForward, is_untouched


class OpaqueLinear(nn.Module):
    """A linear layer for inference without a `weight`: copied by sharing, not saved, not pickled.

    Attributes:
        STATE: what happened to the layer, for messages.
        matrix: the weight, which nothing writes to.
        bias: `[out_features]` or `None`.
    """

    STATE: ClassVar[str]

    in_features: int
    out_features: int
    matrix: Any
    bias: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueLinear:
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.matrix)] = copied, self.matrix
        copied.__dict__.update({key: deepcopy(value, memo) for key, value in vars(self).items()})
        return copied

    def __getstate__(self) -> NoReturn:
        raise TypeError(f"a model that is {self.STATE} cannot be pickled; load it again")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        name = prefix.rstrip(".") or "the layer"
        raise ValueError(
            f"{name} is {self.STATE} and has no weight that a checkpoint could hold; save the "
            "model as it was before"
        )


class OpaqueFeedForward(Wav2Vec2BertFeedForward):
    """A feed-forward block of two opaque layers: one operation, while nobody has touched them.

    Attributes:
        LINEAR: the class of both.
        compute: the operation, from the input, both layers' matrices and biases and the name of the
            activation between them.
    """

    LINEAR: ClassVar[type[OpaqueLinear]]
    compute: ClassVar[Callable[..., Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        """As the class that it was."""
        first: Any = self.intermediate_dense
        second: Any = self.output_dense
        whole = is_untouched(first, self.LINEAR) and is_untouched(second, self.LINEAR)
        if not whole or not isinstance(self.activation, str) or self.training:
            return super().forward(x)
        weights = (first.matrix, first.bias, self.activation, second.matrix, second.bias)
        with torch.no_grad():
            return self.compute(x, *weights)


def swap(block: nn.Module, faster: type[nn.Module]) -> None:
    """Make a block one of another class, which computes the same of the same parts, and faster.

    The block stays the same object, with its parts, hooks and names (`fully_shard` of PyTorch does
    the like).
    """
    block.__class__ = faster
