"""Adds two vectors of argv[1] elements, default 1,000, and compares with PyTorch."""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside)
    y = tl.load(y_ptr + offsets, mask=inside)
    tl.store(out_ptr + offsets, x + y, mask=inside)


def add(x, y, block=256):
    out = torch.full_like(x, float("nan"))
    add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    return out


if __name__ == "__main__":
    torch.manual_seed(0)
    x, y = torch.randn(2, int(sys.argv[1]) if len(sys.argv) > 1 else 1000).unbind()
    torch.testing.assert_close(add(x, y), x + y, rtol=0, atol=0)
    print("the same as PyTorch")
