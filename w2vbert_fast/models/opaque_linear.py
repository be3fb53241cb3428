"""What linear layers share whose weight is in a form that only a CPU's kernels read."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, ClassVar, NoReturn

from torch import nn


class OpaqueLinear(nn.Module):
    """A linear layer for inference without a `weight`: copied by sharing, not saved, not pickled.

    Attributes:
        WEIGHT: name of the attribute that holds the weight, which nothing writes to.
        STATE: what happened to the layer, for messages.
    """

    WEIGHT: ClassVar[str]
    STATE: ClassVar[str]

    in_features: int
    out_features: int

    def __deepcopy__(self, memo: dict[int, Any]) -> OpaqueLinear:
        copied = type(self).__new__(type(self))
        weight = getattr(self, self.WEIGHT)
        memo[id(self)], memo[id(weight)] = copied, weight
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
