"""Compiles a kernel for a GPU that need not be there, and reads what came out."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from csrc_triton.architectures import ARCHITECTURES
from csrc_triton.specs import KernelSpec
from tools.answers import keep, kept
from tools.compile import amdgcn, sass


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as on the command line, `"cuda:90"` or `"hip:gfx942"`.
        arch: as of `architectures.architecture`, `"sm_90"` or `"gfx942"`.
        gpu: Triton's target.
    """

    name: str
    arch: str
    gpu: GPUTarget

    @classmethod
    def parse(cls, name: str) -> Target:
        """The target of a name.

        Raises:
            ValueError: there is no such target, or its limits are not known.
        """
        backend, _, number = name.partition(":")
        arch = f"sm_{number}" if backend == "cuda" else number if backend == "hip" else ""
        if arch not in ARCHITECTURES or (backend == "hip") != arch.startswith("gfx"):
            known = ", ".join(
                f"hip:{arch}" if arch.startswith("gfx") else f"cuda:{arch.removeprefix('sm_')}"
                for arch in ARCHITECTURES
            )
            raise ValueError(f"target is {name!r}; it must be one of {known}")
        gpu = int(number) if backend == "cuda" else number
        return cls(name, arch, GPUTarget(backend, gpu, ARCHITECTURES[arch].warp_size))


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel says.

    Attributes:
        registers: of a thread; on AMD vector registers, accumulators included.
        spills: instructions that load or store spilled registers; on AMD spilled vector registers.
        shared_bytes: shared memory of a block.
        tensor_memory_columns: tensor memory of a block.
        tensor_core: number of tensor-core instructions by kind: HMMA (sm_70 on), HGMMA (sm_90),
            UTCHMMA (tcgen05, sm_100), MFMA (AMD).
        load_bits: number of loads from global memory by bits a thread, or "TMA" for bulk copies.
        hot_loop: instructions in one turn of the innermost loop with the most tensor-core
            instructions, or of the longest one; `None` when there is no loop.
        instructions: of the whole kernel.
    """

    registers: int
    spills: int
    shared_bytes: int
    tensor_memory_columns: int
    tensor_core: dict[str, int]
    load_bits: dict[str, int]
    hot_loop: int | None
    instructions: int


def source_and_options(spec: KernelSpec, target: Target) -> tuple[ASTSource, dict[str, Any]]:
    """What `triton.compile` takes for a kernel as it ships."""
    names = spec.kernel.arg_names
    source = ASTSource(
        spec.kernel,
        {name: spec.signature.get(name, "constexpr") for name in names},
        spec.constants,
        {
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(names)
            if name in spec.divisible_by_16
        },
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.max_registers is not None and target.gpu.backend == "cuda":
        options["maxnreg"] = spec.max_registers
    return source, options


def compile_kernel(spec: KernelSpec, target: Target) -> Any:
    """Triton's compiled kernel; its `asm` holds the machine code. Nothing is launched."""
    source, options = source_and_options(spec, target)
    return triton.compile(source, target=target.gpu, options=options)


def read_code(kernel: Any) -> Code:
    """What the machine code of one of Triton's compiled kernels says."""
    metadata = kernel.metadata
    if "amdgcn" in kernel.asm:
        asm = kernel.asm["amdgcn"]
        opcodes = Counter(opcode for opcode, _ in amdgcn.instructions(asm))
        registers, spills = amdgcn.resource_usage(asm)
        matrix = amdgcn.matrix_instructions(opcodes)
        tensor_core = {"MFMA": matrix} if matrix else {}
        loads = amdgcn.global_load_widths(opcodes)
        hot_loop = amdgcn.hot_loop(asm)
    else:
        cubin = kernel.asm["cubin"]
        text = sass.disassemble(cubin)
        opcodes = sass.opcode_counts(text)
        registers, _ = sass.resource_usage(cubin)
        spills = sass.count(opcodes, (sass.SPILL_LOADS, sass.SPILL_STORES))
        tensor_core = {
            name: number
            for name in sorted(sass.TENSOR_CORE_OPCODES)
            if (number := sass.count(opcodes, name))
        }
        loads = sass.global_load_widths(opcodes)
        loop = sass.hot_loop(text)
        hot_loop = len(loop) if loop else None
    load_bits = {str(bits): loads[bits] for bits in sorted(loads, reverse=True)}
    if bulk := sass.count(opcodes, ("UTMALDG", "UBLKCP")):
        load_bits["TMA"] = bulk
    return Code(
        registers,
        spills,
        metadata.shared,
        getattr(metadata, "tmem_size", 0),
        tensor_core,
        load_bits,
        hot_loop,
        sum(opcodes.values()),
    )


def default_cache() -> Path:
    """A folder beside Triton's own compiled kernels."""
    return Path(knobs.cache.dir) / "w2vbert_fast_machine_code"


@functools.cache
def _readers() -> str:
    files = (__file__, amdgcn.__file__, sass.__file__)
    return "".join(Path(str(file)).read_text() for file in files)


def _cache_key(spec: KernelSpec, target: Target) -> str:
    """Changes with the kernel's source, its configuration, Triton and the code that reads."""
    source, options = source_and_options(spec, target)
    facts = (
        source.hash(),
        sorted(source.signature.items()),
        target.name,
        sorted(options.items()),
        triton.__version__,
        knobs.nvidia.ptxas.path,
        _readers(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def machine_code(spec: KernelSpec, target: Target, cache: Path) -> Code:
    """Compiles a kernel and reads its code, or takes the answer of last time.

    Args:
        spec: the kernel.
        target: the GPU.
        cache: folder of the answers; made when it is missing.
    """
    file = cache / f"{_cache_key(spec, target)}.json"
    if (answer := kept(file)) is not None:
        return Code(**answer)
    code = read_code(compile_kernel(spec, target))
    keep(file, asdict(code))
    return code
