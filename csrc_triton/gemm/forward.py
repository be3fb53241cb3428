"""Linear layers with what follows them: bias, activation, gated linear unit.

For x `[N, K]`, weight `[M, K]` and y = x @ weight.T + bias:

    linear      out = act(y)
    linear_glu  out = y[:, :M/2] * sigmoid(y[:, M/2:])

A program owns one tile of the output, runs over K once with fp32 accumulators, finishes the tile in
registers and stores every element once. So a token costs 2 K M FLOPs and, beyond the weight, K
elements read and M written (M/2 for the gated unit): the activation and the gate move nothing
through memory that has to be read back. fp32 is multiplied in full precision ("ieee").

The gated unit interleaves the two halves of the weight: columns 2j and 2j + 1 of the product's tile
are output j and its gate. A thread of a matrix instruction holds neighbouring columns, so value and
gate meet in registers, and x is read for both at once.

Tiles are numbered in groups of `group_m` row blocks: programs that run together share rows of x and
of the weight in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.architectures import architecture, device_multiprocessors
from csrc_triton.functions import activate, activation_constant, logistic, logistic_form
from csrc_triton.gemm.config import LinearConfig, linear_config
from csrc_triton.gemm.measured import Product, measured_config
from csrc_triton.launch import check_device, check_tensor
from csrc_triton.plans import empty, launch, planned


# Of 1 feature specialisation makes a constant and no loop, and the bias is then moved into the
# accumulators between wgmma.fence and wgmma. Its hint is K_ALIGNMENT instead.
@triton.jit(do_not_specialize=["num_tokens", "in_features"])
def _linear_kernel(
    x_ptr,  # [num_tokens, in_features]
    weight_ptr,  # [out_features, in_features], GATED: [2 * out_features, in_features]
    bias_ptr,  # [out_features], GATED: [2 * out_features]
    out_ptr,  # [num_tokens, out_features]
    num_tokens,
    out_features,
    in_features,
    stride_x_row,
    stride_weight_row,
    stride_out_row,
    ACTIVATION: tl.constexpr,
    LOGISTIC: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    K_ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # BLOCK_N counts columns of the product: a gated tile yields half as many of the output.
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N

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
            left = tl.multiple_of(in_features - start, K_ALIGNMENT)
            x = tl.load(x_ptrs, mask=inner[None, :] < left, other=0.0)
            weight = tl.load(weight_ptrs, mask=inner[:, None] < left, other=0.0)
        product = tl.dot(x, weight, product, input_precision="ieee")
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if HAS_BIAS:
        product += tl.load(bias_ptr + weight_rows).to(tl.float32)[None, :]
    columns = block_n * OUT_N + tl.arange(0, OUT_N)  # [OUT_N]
    if GATED:
        value, gate = tl.split(tl.reshape(product, [BLOCK_M, OUT_N, 2]))  # [BLOCK_M, OUT_N] each
        result = value * logistic(gate, LOGISTIC)
    else:
        result = activate(product, ACTIVATION, LOGISTIC)
    inside = (rows[:, None] < num_tokens) & (columns[None, :] < out_features)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * stride_out_row + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias)`, as `ops.linear`.

    The activation is a name of `functions.ACTIVATIONS` or `None`; `config` is that of
    `measured_config`, or else of `linear_config`, when `None`.
    """
    return _launch(x, weight, bias, activation, False, out, config)


def linear_glu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
) -> Tensor:
    """Gated linear unit, as `ops.linear_glu`; `config` as of `linear`."""
    return _launch(x, weight, bias, None, True, out, config)


@planned
def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    gated: bool,
    out: Tensor | None,
    config: LinearConfig | None,
) -> Tensor:
    constant = activation_constant(activation)
    out_features = check_linear(x, weight, bias, gated)
    num_tokens, in_features = x.shape
    if out is None:
        out = empty((num_tokens, out_features), x.dtype, x.device)
    else:
        check_tensor("out", out, (num_tokens, out_features), (x.dtype,))
    check_device(x=x, weight=weight, bias=bias, out=out)
    if out.numel() == 0:
        return out

    arch = architecture(x.device)
    if config is None:
        epilogue = "glu" if gated else constant
        product = Product(num_tokens, weight.shape[0], in_features, x.dtype, epilogue)
        config = measured_config(x.device, product)
    if config is None:
        count = device_multiprocessors(x.device)
        config = linear_config(num_tokens, *weight.shape, x.dtype, arch, count)
    blocks_m = triton.cdiv(num_tokens, config.block_m)
    # With an even tile, the tiles of a gated product are those of its output.
    blocks_n = triton.cdiv(weight.shape[0], config.block_n)
    launch(
        _linear_kernel,
        (blocks_m * blocks_n,),
        x,
        weight,
        bias,
        out,
        num_tokens,
        out_features,
        in_features,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        LOGISTIC=logistic_form(x.dtype, arch),
        **_constants(config, constant, gated, bias is not None, in_features),
    )
    return out


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool) -> int:
    """Checks the arguments of a linear layer but for their devices; returns its `out_features`."""
    check_tensor("x", x, (None, None))
    check_tensor("weight", weight, (None, x.shape[1]), (x.dtype,))
    width = weight.shape[0]
    if gated and width % 2 != 0:
        raise ValueError(f"weight has {width} rows; a gated unit needs an even number")
    if bias is not None:
        check_tensor("bias", bias, (width,), (x.dtype,))
    return width // 2 if gated else width


def _constants(
    config: LinearConfig, activation: str, gated: bool, has_bias: bool, in_features: int
) -> dict[str, str | bool | int]:
    return {
        "ACTIVATION": activation,
        "GATED": gated,
        "HAS_BIAS": has_bias,
        "EVEN_K": in_features % config.block_k == 0,
        "K_ALIGNMENT": 16 if in_features % 16 == 0 else 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
