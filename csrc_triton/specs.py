"""What the compiler lane needs to know about a kernel as it ships.

Every kernel module has a function `kernel_specs(arch, dtype)` that lists its kernels at the launch
configurations they ship with for model width 1024, so that they can be compiled without a GPU:
`arch` is such as "sm_90", `dtype` the name of the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["gemm", "attention", "pointwise"]


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
        kind: "gemm" and "attention" must use tensor cores where those multiply its dtype.
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
    kind: Kind
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

# An argument's name says its type in all kernels: other pointers are to elements of the
# activations' dtype, other numbers are int32.
_TYPES = {
    **dict.fromkeys(("cu_seqlens_ptr", "frame_cu_seqlens_ptr", "out_cu_seqlens_ptr"), "*i32"),
    **dict.fromkeys(("seqused_k_ptr", "tile_map_ptr"), "*i32"),
    **dict.fromkeys(("best_ptr", "token_ids_ptr", "counts_ptr"), "*i32"),
    **dict.fromkeys(("share_ptr", "scratch_ptr", "shift_ptr", "delta_ptr", "lse_ptr"), "*fp32"),
    **dict.fromkeys(("eps", "scale", "scale_log2", "dropout_p"), "fp32"),
    "seed_ptr": "*i64",
    "scratch_sums_ptr": "*fp64",
}


def kernel_spec(
    name: str,
    kernel: Any,
    constants: Mapping[str, Any],
    dtype: str,
    *,
    num_warps: int,
    num_stages: int = 1,
    absent: Iterable[str] = (),
    types: Mapping[str, str] | None = None,
    blocks: int | tuple[int, ...],
    scalars: Mapping[str, float],
    stride: int,
    arrays: Mapping[str, tuple[int, ...]] | None = None,
    kind: Kind = "pointwise",
    outputs_per_program: int | None = None,
    plain_twin: str | None = None,
    max_registers: int | None = None,
) -> KernelSpec:
    """A kernel as it ships: its signature follows from the names of its arguments, and every
    run-time integer and pointer is a multiple of 16 that the kernel does not say to be none.

    Args:
        name: and so the others that are not named here, as of `KernelSpec`.
        kernel: the `@triton.jit` function.
        constants: value of every `constexpr` argument.
        dtype: name of the activations' dtype.
        num_warps: warps in a block.
        num_stages: software pipeline depth.
        absent: arguments that are `None` in this variant.
        types: of run-time arguments that are of another type than their names say elsewhere.
        blocks: of the launch for the verifier.
        scalars: of that launch, by name; those that the kernel does not have are left out.
        stride: of that launch, for every stride that `scalars` does not name.
        arrays: of that launch; those that the kernel does not have are left out.
        kind: what it does.
        outputs_per_program: elements of the output that one program writes.
        plain_twin: name of the spec without its special part.
        max_registers: cap on a thread's registers.
    """
    fixed = {**constants, **dict.fromkeys(absent)}
    signature = {}
    for argument in kernel.arg_names:
        if argument not in fixed:
            other = "*" + TRITON_TYPES[dtype] if argument.endswith("_ptr") else "i32"
            signature[argument] = (types or {}).get(argument) or _TYPES.get(argument, other)
    unaligned = {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment}
    aligned = {
        n for n, t in signature.items() if n not in unaligned and (t == "i32" or t[0] == "*")
    }
    values = {n: stride for n in signature if n.startswith("stride_")} | dict(scalars)
    return KernelSpec(
        name=name,
        kernel=kernel,
        signature=signature,
        constants=fixed,
        kind=kind,
        dtype=dtype,
        num_warps=num_warps,
        num_stages=num_stages,
        divisible_by_16=frozenset(aligned),
        outputs_per_program=outputs_per_program,
        plain_twin=plain_twin,
        max_registers=max_registers,
        proof=ProofLaunch(
            blocks,
            {n: v for n, v in values.items() if signature.get(n, "*")[0] != "*"},
            {n: v for n, v in (arrays or {}).items() if n in signature},
        ),
    )
