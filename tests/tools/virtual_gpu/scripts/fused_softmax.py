"""Softmax of each row, rows in a loop over programs, and a comparison with PyTorch in float64."""

import torch
import triton
import triton.language as tl


@triton.jit
def softmax_kernel(
    out_ptr, x_ptr, stride_x_row, stride_out_row, rows, columns,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        offsets = tl.arange(0, BLOCK)
        inside = offsets < columns
        x = tl.load(x_ptr + row * stride_x_row + offsets, mask=inside, other=-float("inf"))
        exponentials = tl.exp(x - tl.max(x, axis=0))
        out = exponentials / tl.sum(exponentials, axis=0)
        tl.store(out_ptr + row * stride_out_row + offsets, out, mask=inside)


def softmax(x, programs=2, num_warps=4):
    out = torch.full_like(x, float("nan"))
    softmax_kernel[(programs,)](
        out, x, x.stride(0), out.stride(0), *x.shape,
        BLOCK=triton.next_power_of_2(x.shape[1]), STAGES=2, num_warps=num_warps,
    )  # fmt: skip
    return out


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(5, 217)
    torch.testing.assert_close(softmax(x), x.double().softmax(1).float(), rtol=2e-6, atol=1e-7)
    print("the same as PyTorch")
