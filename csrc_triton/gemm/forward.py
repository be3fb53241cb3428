"""Linear layers with what follows them: bias, activation, gated linear unit, residual.

For x `[N, K]`, weight `[M, K]` and y = x @ weight.T + bias:

    linear           out = act(y)
    linear_glu       out = y[:, :M/2] * sigmoid(y[:, M/2:])
    linear_residual  out = residual + scale * y

A program owns one tile of the output, runs over K once with fp32 accumulators, finishes the tile in
registers and stores every element once. So a token costs 2 K M FLOPs and, beyond the weight, K
elements read and M written (M/2 for the gated unit; M more read for the residual): the activation,
the gate and the sum move nothing through memory that has to be read back.

The gated unit interleaves the two halves of the weight: columns 2j and 2j + 1 of the product's tile
are output j and its gate. A thread of a matrix instruction holds neighbouring columns, so value and
gate meet in registers, and x is read for both at once.

Tiles are numbered in groups of `group_m` row blocks: programs that run together share rows of x and
of the weight in L2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..architectures import architecture
from ..functions import activate, activation_constant
from ..launch import check_device, check_tensor
from ..specs import TRITON_TYPES, KernelSpec, ProofLaunch
from .config import PRECISIONS, LinearConfig, linear_candidates, linear_config


@triton.jit
def _store_tile(
    result,  # [BLOCK_M, WIDTH], fp32
    rows,  # [BLOCK_M]
    columns,  # [WIDTH]
    residual_ptr,
    out_ptr,
    num_tokens,
    out_features,
    stride_residual_row,
    stride_out_row,
    scale,
    HAS_RESIDUAL: tl.constexpr,
):
    """Adds the residual, then stores what lies inside the output."""
    wide_rows = rows.to(tl.int64)[:, None]
    inside = (rows[:, None] < num_tokens) & (columns[None, :] < out_features)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + wide_rows * stride_residual_row + columns[None, :]
        residual = tl.load(residual_ptrs, mask=inside, other=0.0)
        result = residual.to(tl.float32) + scale * result
    out_ptrs = out_ptr + wide_rows * stride_out_row + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features], GATED: [2 * out_features, in_features]
    bias_ptr,  # [out_features], GATED: [2 * out_features]
    residual_ptr,  # [num_tokens, out_features]
    out_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    in_features,
    stride_x_row,
    stride_weight_row,
    stride_residual_row,
    stride_out_row,
    scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # BLOCK_N counts columns of the product: a gated tile yields half as many of the output.
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    HALVES: tl.constexpr = HAS_RESIDUAL and OUT_N >= 256

    program = tl.program_id(0)
    num_blocks_m = tl.cdiv(num_tokens, BLOCK_M)
    num_blocks_n = tl.cdiv(out_features, OUT_N)
    group = program // (GROUP_M * num_blocks_n)
    in_group = program % (GROUP_M * num_blocks_n)
    group_rows = tl.minimum(num_blocks_m - group * GROUP_M, GROUP_M)
    block_m = group * GROUP_M + in_group % group_rows
    block_n = in_group // group_rows

    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    product_columns = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    # Rows and columns past the end repeat the last one, so the loop needs no mask for them; the
    # store leaves them out.
    last_row = tl.minimum(rows, num_tokens - 1).to(tl.int64)
    if GATED:
        weight_rows = tl.minimum(block_n * OUT_N + product_columns // 2, out_features - 1)
        weight_rows += (product_columns % 2) * out_features
    else:
        weight_rows = tl.minimum(block_n * OUT_N + product_columns, out_features - 1)

    inner = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    x_ptrs = x_ptr + last_row[:, None] * stride_x_row + inner[None, :]
    # Read as its transpose, so that the product needs none.
    wide_weight_rows = weight_rows.to(tl.int64)[None, :]
    weight_ptrs = weight_ptr + wide_weight_rows * stride_weight_row + inner[:, None]

    product = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, in_features, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            left = in_features - start
            x = tl.load(x_ptrs, mask=inner[None, :] < left, other=0.0)
            weight = tl.load(weight_ptrs, mask=inner[:, None] < left, other=0.0)
        product = tl.dot(x, weight, product, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if HAS_BIAS:
        product += tl.load(bias_ptr + weight_rows).to(tl.float32)[None, :]
    columns = block_n * OUT_N + tl.arange(0, OUT_N)  # [OUT_N]
    if GATED:
        value, gate = tl.split(tl.reshape(product, [BLOCK_M, OUT_N, 2]))  # [BLOCK_M, OUT_N] each
        result = value / (1.0 + tl.exp(-gate))
    else:
        result = activate(product, ACTIVATION)
    if HALVES:
        # The residual's tile on top of all accumulators is more than the registers hold.
        pairs = tl.permute(tl.reshape(result, [BLOCK_M, 2, OUT_N // 2]), [0, 2, 1])
        left, right = tl.split(pairs)  # [BLOCK_M, OUT_N / 2] each
        columns = block_n * OUT_N + tl.arange(0, OUT_N // 2)
        _store_tile(
            left, rows, columns, residual_ptr, out_ptr, num_tokens, out_features,
            stride_residual_row, stride_out_row, scale, HAS_RESIDUAL,
        )  # fmt: skip
        _store_tile(
            right, rows, columns + OUT_N // 2, residual_ptr, out_ptr, num_tokens, out_features,
            stride_residual_row, stride_out_row, scale, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        _store_tile(
            result, rows, columns, residual_ptr, out_ptr, num_tokens, out_features,
            stride_residual_row, stride_out_row, scale, HAS_RESIDUAL,
        )  # fmt: skip


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    precision: str | None = None,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`, fp16, bf16 or fp32; rows may be strided, as in all of these.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        activation: "silu" or "swish", "gelu" (with erf), "gelu_new", "relu", "selu", "linear" or
            `None`.
        precision: of fp32 products: "ieee" (the default) or "tf32x3"; without effect on fp16, bf16.
        out: `[num_tokens, out_features]` to write to, or `None` for a new tensor.
        config: launch configuration; by default `linear_config` chooses.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device, stride or name that does not fit.
        RuntimeError: the tensors are on a CPU and Triton's interpreter is off.
    """
    return _launch(
        x, weight, bias, None, 1.0, activation_constant(activation), False, precision, out, config
    )


def linear_glu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: str | None = None,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """Gated linear unit `a * sigmoid(b)` with `[a, b] = x @ weight.T + bias` (Dauphin et al. 2017).

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[2 * out_features, in_features]`; the first half gives `a`, the second the gate.
        bias: `[2 * out_features]` or `None`.
        precision: as in `linear`.
        out: `[num_tokens, out_features]` to write to, or `None` for a new tensor.
        config: launch configuration; by default `linear_config` chooses.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device, stride or name that does not fit.
        RuntimeError: the tensors are on a CPU and Triton's interpreter is off.
    """
    return _launch(x, weight, bias, None, 1.0, "identity", True, precision, out, config)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    scale: float = 1.0,
    precision: str | None = None,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """`residual + scale * (x @ weight.T + bias)`.

    Args:
        x: `[num_tokens, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or `None`.
        residual: `[num_tokens, out_features]`.
        scale: a number; a new one does not recompile.
        precision: as in `linear`.
        out: `[num_tokens, out_features]` to write to, or `None` for a new tensor. It may be
            `residual` itself.
        config: launch configuration; by default `linear_config` chooses.

    Returns:
        `[num_tokens, out_features]` in the dtype of `x`.

    Raises:
        ValueError: a shape, dtype, device, stride or name that does not fit.
        RuntimeError: the tensors are on a CPU and Triton's interpreter is off.
    """
    return _launch(x, weight, bias, residual, scale, "identity", False, precision, out, config)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scale: float,
    activation: str,
    gated: bool,
    precision: str | None,
    out: Tensor | None,
    config: LinearConfig | None,
) -> Tensor:
    check_tensor("x", x, (None, None))
    num_tokens, in_features = x.shape
    check_tensor("weight", weight, (None, in_features), (x.dtype,))
    product_columns = weight.shape[0]
    if gated and product_columns % 2 != 0:
        raise ValueError(f"weight has {product_columns} rows; a gated unit needs an even number")
    out_features = product_columns // 2 if gated else product_columns
    if bias is not None:
        check_tensor("bias", bias, (product_columns,), (x.dtype,))
    if residual is not None:
        check_tensor("residual", residual, (num_tokens, out_features), (x.dtype,))
    precision = precision or "ieee"
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {PRECISIONS}")
    if out is None:
        out = torch.empty((num_tokens, out_features), dtype=x.dtype, device=x.device)
    else:
        check_tensor("out", out, (num_tokens, out_features), (x.dtype,))
    check_device(x=x, weight=weight, bias=bias, residual=residual, out=out)
    if out.numel() == 0:
        return out

    if config is None:
        arch = architecture(x.device)
        config = linear_config(num_tokens, product_columns, x.dtype, arch, precision)
    blocks_m = triton.cdiv(num_tokens, config.block_m)
    # With an even tile, the tiles of a gated product are those of its output.
    blocks_n = triton.cdiv(product_columns, config.block_n)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        _linear_kernel[(blocks_m * blocks_n,)](
            x,
            weight,
            bias,
            residual,
            out,
            num_tokens,
            out_features,
            in_features,
            x.stride(0),
            weight.stride(0),
            0 if residual is None else residual.stride(0),
            out.stride(0),
            float(scale),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **_constants(config, activation, gated, bias, residual, precision, in_features),
        )
    return out


def _constants(
    config: LinearConfig,
    activation: str,
    gated: bool,
    bias: object | None,
    residual: object | None,
    precision: str,
    in_features: int,
) -> dict[str, str | bool | int]:
    return {
        "ACTIVATION": activation,
        "GATED": gated,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "PRECISION": precision,
        "EVEN_K": in_features % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


# (name, activation, gated, bias, residual, in_features)
_SHIPPED = (
    ("linear/bias", "identity", False, True, False, 1024),
    ("linear/bias_features", "identity", False, True, False, 160),
    ("linear/bias_silu", "silu", False, True, False, 1024),
    ("linear_glu", "identity", True, False, False, 1024),
    ("linear_residual", "identity", False, False, True, 1024),
    ("linear_residual/bias", "identity", False, True, True, 4096),
)


def kernel_specs(arch: str, dtype: str) -> list[KernelSpec]:
    """The linear kernels of an encoder of width 1024, feed-forward width 4096 and 160 features.

    Args:
        arch: such as `"sm_90"` or `"gfx942"`.
        dtype: "float16", "bfloat16" or "float32".
    """
    specs: list[KernelSpec] = []
    for precision in PRECISIONS if dtype == "float32" else PRECISIONS[:1]:
        try:
            candidates = linear_candidates(getattr(torch, dtype), arch, precision)
        except ValueError:
            continue  # tf32x3 where there is no tf32
        for config in candidates:
            for variant in _SHIPPED:
                spec = _kernel_spec(variant, arch, dtype, precision, config)
                # Where 160 features are whole steps, their kernel is that of 1024.
                if not any(spec.constants == other.constants for other in specs):
                    specs.append(spec)
    return specs


def _proof_launch(
    signature: dict[str, str], config: LinearConfig, gated: bool, in_features: int
) -> ProofLaunch:
    """Two by two tiles, the last row and 16 columns past the first; a few steps over K."""
    columns = config.block_n // (2 if gated else 1) + 16
    inner = in_features if in_features % config.block_k else 4 * config.block_k
    values = {
        "num_tokens": config.block_m + 1,
        "out_features": columns,
        "in_features": inner,
        "stride_x_row": inner,
        "stride_weight_row": inner,
        "stride_residual_row": columns,
        "stride_out_row": columns,
        "scale": 0.5,
    }
    return ProofLaunch(4, {name: value for name, value in values.items() if name in signature})


def _kernel_spec(
    variant: tuple[str, str, bool, bool, bool, int],
    arch: str,
    dtype: str,
    precision: str,
    config: LinearConfig,
) -> KernelSpec:
    name, activation, gated, has_bias, has_residual, in_features = variant
    bias, residual = has_bias or None, has_residual or None
    constants: dict[str, Any] = {
        **_constants(config, activation, gated, bias, residual, precision, in_features),
        **({} if has_bias else {"bias_ptr": None}),
        **({} if has_residual else {"residual_ptr": None}),
    }
    pointers = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    strides = ("stride_x_row", "stride_weight_row", "stride_residual_row", "stride_out_row")
    types = {
        **dict.fromkeys(pointers, f"*{TRITON_TYPES[dtype]}"),
        **dict.fromkeys(("num_tokens", "out_features", "in_features", *strides), "i32"),
        "scale": "fp32",
    }
    signature = {argument: type_ for argument, type_ in types.items() if argument not in constants}
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    # sm_75 gets its products from Triton as multiply-adds, and "ieee" asks for them.
    matrix_unit = arch != "sm_75" and (dtype != "float32" or precision != "ieee")
    return KernelSpec(
        name="/".join([name, *([precision] if dtype == "float32" else []), tile]),
        kernel=_linear_kernel,
        signature=signature,
        constants=constants,
        kind="gemm" if matrix_unit else "pointwise",
        dtype=dtype,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        divisible_by_16=frozenset(signature) - {"num_tokens", "scale"},
        outputs_per_program=config.block_m * config.block_n // (2 if gated else 1),
        proof=_proof_launch(signature, config, gated, in_features),
    )
