"""A product of matrices in argv[1] (float16, bfloat16, float32: tf32), ragged in all dimensions."""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (offs_m % M)[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + (offs_n % N)[None, :] * stride_bn
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k * BLOCK_K, other=0.0)
        accumulator = tl.dot(a, b, accumulator)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(c_ptrs, accumulator.to(c_ptr.dtype.element_ty), mask=inside)


def matmul(a, b):
    (m, k), n = a.shape, b.shape[1]
    c = torch.full((m, n), float("nan"), dtype=a.dtype)
    matmul_kernel[(triton.cdiv(m, 64), triton.cdiv(n, 64))](
        a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(),
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=3,
    )  # fmt: skip
    return c


if __name__ == "__main__":
    torch.manual_seed(0)
    dtype = getattr(torch, sys.argv[1])
    a, b = torch.randn(70, 104).to(dtype), torch.randn(104, 48).to(dtype)
    # What a tf32 operand may be off by, times the root of the number of products.
    limit = {torch.float32: 2**-10 * 104**0.5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(
        matmul(a, b).double(), a.double() @ b.double(), rtol=limit, atol=limit
    )
    print("the same as PyTorch")
