"""A product of matrices in argv[1] (float16, bfloat16, float32: tf32) by tensor descriptors, which
the kernel or (argv[2]: host) its caller makes. It is ragged: boxes reach out of all matrices."""

import sys

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def described(tensor, rows, columns, block: tl.constexpr):
    if isinstance(tensor, tl.tensor_descriptor):
        return tensor
    else:
        return tl.make_tensor_descriptor(tensor, [rows, columns], [columns, 1], block)


@triton.jit
def product_kernel(
    a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    a = described(a, M, K, [BLOCK_M, BLOCK_K])
    b = described(b, K, N, [BLOCK_K, BLOCK_N])
    c = described(c, M, N, [BLOCK_M, BLOCK_N])
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        total = tl.dot(a.load([row, k]), b.load([k, column]), total)
    c.store([row, column], total.to(c.dtype))


def product(a, b, from_host=False):
    (m, k), n = a.shape, b.shape[1]
    c = torch.full((m, n), float("nan"), dtype=a.dtype)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    given = a, b, c
    if from_host:
        shapes = ([64, 32], [32, 64], [64, 64])
        given = map(TensorDescriptor.from_tensor, given, shapes)
    grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
    product_kernel[grid](*given, m, n, k, **blocks, num_stages=3)
    return c


if __name__ == "__main__":
    torch.manual_seed(0)
    dtype = getattr(torch, sys.argv[1])
    a, b = torch.randn(70, 104).to(dtype), torch.randn(104, 48).to(dtype)
    # What a tf32 operand may be off by, times the root of the number of products.
    limit = {torch.float32: 2**-10 * 104**0.5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(
        product(a, b, "host" in sys.argv).double(), a.double() @ b.double(), rtol=limit, atol=limit
    )
    print("the same as PyTorch")
