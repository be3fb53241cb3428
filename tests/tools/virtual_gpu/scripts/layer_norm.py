"""Layer norm of each row, forward, and a comparison with PyTorch in float64."""

import torch
import triton
import triton.language as tl


@triton.jit
def layer_norm_kernel(
    x_ptr, out_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, stride, columns, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_ptr += row * stride
    out_ptr += row * stride
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / columns
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        x = tl.where(offsets < columns, x - mean, 0.0)
        squares += x * x
    rstd = 1 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + offsets, mask=inside)
        bias = tl.load(bias_ptr + offsets, mask=inside)
        tl.store(out_ptr + offsets, (x - mean) * rstd * weight + bias, mask=inside)


def layer_norm(x, weight, bias, eps=1e-5):
    out = torch.full_like(x, float("nan"))
    mean, rstd = torch.full((2, x.shape[0]), float("nan"))
    layer_norm_kernel[(x.shape[0],)](
        x, out, weight, bias, mean, rstd, x.stride(0), x.shape[1], eps, BLOCK=128
    )
    return out, mean, rstd


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x, weight, bias = torch.randn(3, 217), torch.rand(217), torch.randn(217)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        out, mean, _ = layer_norm(x, weight, bias)
        right = torch.layer_norm(x.double(), [217], weight.double(), bias.double(), 1e-5)
        step = {torch.float32: 4e-6}.get(dtype, torch.finfo(dtype).eps)
        torch.testing.assert_close(out.double(), right, rtol=step, atol=step / 4)
        torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=1e-6, atol=1e-6)
    print("the same as PyTorch")
