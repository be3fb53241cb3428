"""Compiles a kernel for a GPU that need not be there, and reads what came out."""

from __future__ import annotations

import functools
import hashlib
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from tools.answers import keep, kept
from tools.compile import amdgcn, sass
from tools.virtual_gpu.requests import Uncompiled


@dataclass(frozen=True)
class Code:
    """What the machine code of one kernel says.

    Attributes:
        registers: of a thread; on AMD vector registers, accumulators included.
        spills: instructions that load or store spilled registers; on AMD spilled vector registers.
        shared_bytes: shared memory of a block.
        tensor_memory_columns: tensor memory of a block.
        products: number of products in the source by the dtype of what they multiply.
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
    products: dict[str, int]
    tensor_core: dict[str, int]
    load_bits: dict[str, int]
    hot_loop: int | None
    instructions: int


_PRODUCT = re.compile(r"\btt\.dot\b.*? : tensor<[\dx]*x(\w+)>")
_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "f64": "float64"}


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
        dict(Counter(_DTYPES[name] for name in _PRODUCT.findall(kernel.asm["ttir"]))),
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


def _cache_key(request: Uncompiled) -> str:
    """Changes with the kernel's source, what is asked of Triton, Triton and the code that reads."""
    facts = (
        request.source.hash(),
        request.key,
        request.target,
        triton.__version__,
        knobs.nvidia.ptxas.path,
        _readers(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def machine_code(request: Uncompiled, cache: Path) -> Code:
    """Compiles a kernel and reads its code, or takes the answer of last time.

    Args:
        request: the kernel.
        cache: folder of the answers; made when it is missing.
    """
    file = cache / f"{_cache_key(request)}.json"
    if (answer := kept(file)) is not None:
        return Code(**answer)
    code = read_code(request.compiled())
    keep(file, asdict(code))
    return code
