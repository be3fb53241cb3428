"""Peak rates of the GPUs that the cost ledger's roofline times are for.

They are the vendors' figures for dense operands, which no kernel reaches: a roofline time is a
lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    Attributes:
        name: as people say it.
        arch: the name by which `csrc_triton.architectures` knows it.
        multiprocessors: that this device has.
        bandwidth: of device memory, bytes a second.
        matrix: FLOP/s of matrix products by dtype. "fp32" is full precision ("ieee"), as both the
            kernels and PyTorch run it by default: the vector units on NVIDIA, which has no such
            matrix instruction.
        vector: FLOP/s of the vector units in fp32.
        double: FLOP/s of the vector units in fp64.
        source: where the figures are published.
    """

    name: str
    arch: str
    multiprocessors: int
    bandwidth: float
    matrix: dict[str, float]
    vector: float
    double: float
    source: str


A100 = Gpu(
    name="A100 SXM 80 GB",
    arch="sm_80",
    multiprocessors=108,
    bandwidth=2.039e12,
    matrix={"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    vector=19.5e12,
    double=9.7e12,
    source="NVIDIA A100 Tensor Core GPU data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4)",
)

# The data sheet's tensor-core figures are with sparsity; the dense ones are half of them.
H100 = Gpu(
    name="H100 SXM",
    arch="sm_90",
    multiprocessors=132,
    bandwidth=3.35e12,
    matrix={"bf16": 989.4e12, "fp16": 989.4e12, "fp32": 66.9e12},
    vector=66.9e12,
    double=33.5e12,
    source="NVIDIA H100 Tensor Core GPU Architecture white paper, table of peak rates (SXM5)",
)

H200 = replace(
    H100,
    name="H200 SXM",
    bandwidth=4.8e12,
    source="NVIDIA H200 Tensor Core GPU data sheet; rates of arithmetic are the H100's",
)

L40S = Gpu(
    name="L40S",
    arch="sm_89",
    multiprocessors=142,
    bandwidth=0.864e12,
    matrix={"bf16": 362.05e12, "fp16": 362.05e12, "fp32": 91.6e12},
    vector=91.6e12,
    double=1.43e12,
    source="NVIDIA L40S data sheet; fp64 at a 64th of fp32, NVIDIA Ada GPU Architecture",
)

MI300X = Gpu(
    name="MI300X",
    arch="gfx942",
    multiprocessors=304,
    bandwidth=5.3e12,
    matrix={"bf16": 1307.4e12, "fp16": 1307.4e12, "fp32": 163.4e12},
    vector=163.4e12,
    double=81.7e12,
    source="AMD Instinct MI300X Accelerator data sheet",
)

GPUS = (A100, H100, MI300X)
"""Of the rooflines."""
