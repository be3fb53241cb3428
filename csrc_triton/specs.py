"""What the compiler lane needs to know about a kernel as it ships.

Every kernel module has a function `kernel_specs(arch, dtype)` that lists its kernels at the launch
configurations they ship with for model width 1024, so that they can be compiled without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ProofLaunch:
    """A small fixed launch for the verifier: several blocks, the last one not full.

    Attributes:
        blocks: number of programs: along x, or along x, y and z.
        scalars: value of every run-time argument that is no pointer.
        arrays: contents of the int32 arrays that steer the control flow, such as offsets.
    """

    blocks: int | tuple[int, ...]
    scalars: Mapping[str, float]
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Number of programs along x, y and z."""
        x, y, z, *_ = (*((self.blocks,) if isinstance(self.blocks, int) else self.blocks), 1, 1)
        return x, y, z


@dataclass(frozen=True)
class KernelSpec:
    """One kernel at one shipped configuration.

    Attributes:
        name: a name that says kernel and variant, such as `shaw_attention_fwd/relative_key`.
        kernel: the `@triton.jit` function.
        signature: Triton type of every run-time argument, such as `"*bf16"`, `"i32"`, `"fp32"`.
        constants: value of every `constexpr` argument.
        kind: "gemm" and "attention" must use tensor cores on sm_80 and newer.
        dtype: name of the activations' dtype.
        num_warps: warps in a block.
        num_stages: software pipeline depth.
        max_registers: registers a thread may use (Triton's `maxnreg`); `None` for no cap.
        divisible_by_16: run-time arguments (pointers, strides) known to be multiples of 16.
        outputs_per_program: elements of the output that one program writes, where that is counted.
        plain_twin: name of the spec that does the same without its special part (attention without
            positions), to compare hot loops with.
        proof: the launch at which the verifier checks it.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    kind: Literal["gemm", "attention", "pointwise"]
    dtype: str
    num_warps: int
    num_stages: int
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    outputs_per_program: int | None = None
    plain_twin: str | None = None
    max_registers: int | None = None
    proof: ProofLaunch | None = None


TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Triton's name of an element type, by torch's."""
