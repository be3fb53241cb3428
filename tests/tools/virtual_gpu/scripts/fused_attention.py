"""Attention with an online softmax in argv[1] (float16, bfloat16), and PyTorch's in float64."""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_head, scale, frames,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    q_ptr += head * stride_head
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    out_ptr += head * stride_head
    rows = offs_m[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptr + rows, mask=offs_m[:, None] < frames, other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, frames, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        keys = offs_n[None, :] * D + offs_d[:, None]
        k = tl.load(k_ptr + keys, mask=offs_n[None, :] < frames, other=0.0)
        values = offs_n[:, None] * D + offs_d[None, :]
        v = tl.load(v_ptr + values, mask=offs_n[:, None] < frames, other=0.0)
        scores = tl.where(offs_n[None, :] < frames, tl.dot(q, k) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.math.exp2(scores - higher[:, None])
        correction = tl.math.exp2(highest - higher)
        total = total * correction + tl.sum(weights, 1)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None])
        highest = higher
    tl.store(lse_ptr + head * frames + offs_m, highest + tl.math.log2(total), mask=offs_m < frames)
    out = (accumulator / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows, out, mask=offs_m[:, None] < frames)


def attention(q, k, v):
    heads, frames, d = q.shape
    out = torch.full_like(q, float("nan"))
    lse = torch.full((heads, frames), float("nan"))
    attention_kernel[(triton.cdiv(frames, 64), heads)](
        q, k, v, out, lse, q.stride(0), d**-0.5 / 0.6931471805599453, frames,
        D=d, BLOCK_M=64, BLOCK_N=32, num_stages=2,
    )  # fmt: skip
    return out


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 70, 64).to(getattr(torch, sys.argv[1])).unbind()
    right = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    limit = torch.finfo(q.dtype).eps
    torch.testing.assert_close(attention(q, k, v).double(), right, rtol=limit, atol=limit)
    print("the same as PyTorch")
