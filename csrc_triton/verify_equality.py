"""What kernels compute, as PyTorch that the verifier can read, for proofs in real arithmetic.

The functions are the twins of `w2vbert_fast/ops` written with operations that the verifier knows,
on fp32 tensors. It matches sums term by term, so they are written out. They return the bits of
their results, because the kernels store bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import norm
from .specs import KernelSpec

EQUALITY_WIDTH = 256
"""The verifier's time grows faster than the width; it does not get through 1024 channels."""


@dataclass(frozen=True)
class Equality:
    """A kernel and what it is to be equal to.

    Attributes:
        spec: the kernel, in fp32.
        reference: the function, of tensors and then scalars.
        inputs: the kernel's argument for each tensor of the reference, and its shape.
        scalars: values of the other arguments of the reference.
        outputs: the kernel's argument for each output, and its shape.
    """

    spec: KernelSpec
    reference: Callable[..., Any]
    inputs: dict[str, tuple[str, tuple[int, ...]]]
    scalars: dict[str, float]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def source(self) -> str:
        """A Python file with the reference under the name `reference`."""
        functions = (_total, _normalise, self.reference)
        text = "\n\n".join(inspect.getsource(function) for function in functions)
        return (
            "from __future__ import annotations\n\nimport torch\nfrom torch import Tensor\n\n\n"
            f"{text}\n\nreference = {self.reference.__name__}\n"
        )


def _total(x: Tensor) -> Tensor:
    total = x[:, :1]
    for column in range(1, x.shape[1]):
        total = total + x[:, column : column + 1]
    return total


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - _total(x) / x.shape[1]
    variance = _total(centred * centred) / x.shape[1]
    return centred * torch.rsqrt(variance + eps) * weight + bias


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The bits of `LN(x)`, int32 `[num_tokens, hidden]`."""
    return _normalise(x, weight, bias, eps).view(torch.int32)


def residual_layer_norm(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The bits of `y = residual + scale * x` and of `LN(y)`, both int32 `[num_tokens, hidden]`."""
    y = residual + scale * x
    return y.view(torch.int32), _normalise(y, weight, bias, eps).view(torch.int32)


def equalities(arch: str, width: int = EQUALITY_WIDTH) -> list[Equality]:
    """The equalities to prove for an architecture.

    Args:
        arch: such as `"sm_90"`.
        width: channels of the norms.
    """
    specs = {spec.name: spec for spec in norm.kernel_specs(arch, "float32", width)}
    cases = []
    for name, reference in (
        ("layer_norm_fwd", layer_norm),
        ("residual_layer_norm_fwd", residual_layer_norm),
    ):
        spec = specs[name]
        if spec.proof is None:
            raise ValueError(f"{name} has no launch for the verifier")
        rows = min(int(spec.proof.scalars["num_rows"]), 5)
        blocks = -(-rows // spec.constants["ROWS"])
        scalars = {**spec.proof.scalars, "num_rows": rows}
        spec = replace(
            spec,
            name=f"{name}/{width}",
            proof=replace(spec.proof, blocks=blocks, scalars=scalars),
        )
        matrix: tuple[int, ...] = (rows, width)
        vector: tuple[int, ...] = (width,)
        has_residual = reference is residual_layer_norm
        inputs = {"residual": ("residual_ptr", matrix)} if has_residual else {}
        inputs |= {
            "x": ("x_ptr", matrix),
            "weight": ("first_weight_ptr", vector),
            "bias": ("first_bias_ptr", vector),
        }
        values = {"scale": scalars["scale"]} if has_residual else {}
        values["eps"] = scalars["eps"]
        outputs = (("sum_ptr", matrix),) if has_residual else ()
        cases.append(Equality(spec, reference, inputs, values, (*outputs, ("first_ptr", matrix))))
    return cases
