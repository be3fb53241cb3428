"""One set of example calls of the operations, for whatever calls every one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """How large the tensors of the examples are.

    Attributes:
        lengths: frames of each utterance.
        width: channels of the encoder.
        inner: channels inside a feed-forward layer.
        heads: attention heads.
        head_size: channels of a head.
        left: frames to the left beyond which distances are equal.
        right: and to the right.
        taps: of the convolution.
        vocabulary: tokens that decoding chooses among.
        activation: of the operations that have one.
    """

    lengths: tuple[int, ...] = (5, 0, 7)
    width: int = 8
    inner: int = 6
    heads: int = 2
    head_size: int = 4
    left: int = 3
    right: int = 2
    taps: int = 3
    vocabulary: int = 3
    activation: str = "silu"


class _Draw:
    """Random tensors of one dtype on one device."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device | str, seed: int
    ) -> None:
        self.sizes, self.dtype, self.device = sizes, dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if torch.device(self.device).type == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        values = torch.randn(*shape, generator=self.generator)
        return values.to(self.device, self.dtype if dtype is None else dtype)

    def rows(self, width: int | None = None) -> Tensor:
        """`[num_tokens, width]`."""
        return self.tensor(sum(self.sizes.lengths), width or self.sizes.width)

    def heads(self) -> tuple[Tensor, ...]:
        """Query, key and value."""
        shape = (sum(self.sizes.lengths), self.sizes.heads, self.sizes.head_size)
        return tuple(self.tensor(*shape) for _ in range(3))

    def matrix(self, out_features: int, in_features: int) -> Tensor:
        """A weight that leaves the size of what it multiplies."""
        return self.tensor(out_features, in_features).mul_(in_features**-0.5)

    def norm(self) -> tuple[Tensor, Tensor]:
        """Weight and bias; the published model's weights are around 1."""
        return 1.0 + 0.25 * self.tensor(self.sizes.width), self.tensor(self.sizes.width)

    def offsets(self, lengths: tuple[int, ...] | None = None) -> Tensor:
        """`cu_seqlens`."""
        ends = torch.tensor([0, *(lengths or self.sizes.lengths)]).cumsum(0)
        return ends.to(self.device, torch.int32)


_EPS = 1e-5
_SAMPLES = (1600, 0, 400, 2000)
_MEL_BINS = 80
_EXAMPLES: dict[str, Callable[[_Draw, Sizes], tuple[Any, ...]]] = {
    "layer_norm": lambda d, s: (d.rows(), *d.norm(), _EPS),
    "residual_layer_norm": lambda d, s: (d.rows(), d.rows(), 0.5, *d.norm(), _EPS),
    "residual_double_layer_norm": lambda d, s: (
        *(d.rows(), d.rows(), 0.5),
        *(*d.norm(), *d.norm(), _EPS),
    ),
    "linear": lambda d, s: (
        *(d.rows(), d.matrix(s.inner, s.width), d.tensor(s.inner)),
        s.activation,
    ),
    "linear_glu": lambda d, s: (
        *(d.rows(), d.matrix(2 * s.width, s.width)),
        d.tensor(2 * s.width),
    ),
    "feed_forward": lambda d, s: (
        *(d.rows(), d.matrix(s.inner, s.width), d.tensor(s.inner), s.activation),
        *(d.matrix(s.width, s.inner), d.tensor(s.width)),
    ),
    "linear_stacked": lambda d, s: (
        d.rows(),
        [d.matrix(s.width, s.width) for _ in range(3)],
        [d.tensor(s.width) for _ in range(3)],
    ),
    "conv_norm_act": lambda d, s: (
        *(d.rows(), d.tensor(s.width, s.taps) * s.taps**-0.5, *d.norm()),
        *(_EPS, s.activation, d.offsets()),
    ),
    "attention_tile_map": lambda d, s: (d.rows(), s.head_size, d.offsets(), max(s.lengths)),
    "shaw_attention": lambda d, s: (
        *(*d.heads(), d.offsets(), max(s.lengths)),
        *(d.tensor(s.left + s.right + 1, s.head_size), s.left, s.right),
    ),
    "ctc_greedy": lambda d, s: (d.rows(s.vocabulary), d.offsets(), 0),
    "log_mel_filterbank": lambda d, s: (
        *(d.tensor(sum(_SAMPLES), dtype=torch.float32), d.offsets(_SAMPLES)),
        *(_MEL_BINS, 16_000),
    ),
    "normalize_and_stack": lambda d, s: (
        *(d.tensor(sum(s.lengths), _MEL_BINS, dtype=torch.float32), d.offsets()),
        2,
    ),
}


def example(
    name: str,
    sizes: Sizes | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Arguments of `torch.ops.w2vbert.<name>`, of a gradient too: the same at each call.

    Args:
        name: of an operation.
        sizes: of its tensors; small when `None`.
        dtype: of its floating-point tensors; the filterbank's operations take float32 alone.
        device: where its tensors are.
        seed: of their values.
        changes: arguments of the operation itself, not of its gradient, that are others, by name.
    """
    draw = _Draw(sizes or Sizes(), dtype, device, seed)
    forward = name if name in _EXAMPLES else name.removesuffix("_backward")
    of_forward, of_backward = (
        getattr(torch.ops.w2vbert, n).default._schema for n in (forward, name)
    )
    arguments = _EXAMPLES[forward](draw, draw.sizes)
    values = {argument.name: argument.default_value for argument in of_forward.arguments}
    values |= dict(zip(values, arguments, strict=False))
    if changes:
        values |= changes
        arguments = tuple(values.values())
    if name == forward:
        return arguments
    results = getattr(torch.ops.w2vbert, forward)(*arguments)
    results = (results,) if isinstance(results, Tensor) else results
    could_need = [a for a in of_backward.arguments if a.name in values and "Tensor" in str(a.type)]
    values["needs"] = [True] * len(could_need)
    values["grad"] = draw.tensor(*results[0].shape)
    for result, tensor in zip(of_forward.returns, results, strict=True):
        values |= {result.name: tensor, f"grad_{result.name}": draw.tensor(*tensor.shape)}
    return tuple(values[argument.name] for argument in of_backward.arguments)
