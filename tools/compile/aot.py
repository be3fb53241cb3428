"""Compiles every kernel as it ships, for GPUs that need not be there, and checks the machine code.

    python -m tools.compile --targets cuda:80,cuda:90,hip:gfx942 --json rows.json

prints one row for each kernel, target and dtype. The exit status is 1 when a kernel

* does not compile;
* spills registers on sm_80, sm_89 or sm_90;
* has a product, and no tensor-core instruction where those multiply its dtype;
* needs more shared memory than the target has, or does not fit a multiprocessor otherwise;
* is attention with positions and spends over 10 % more instructions on a far key block than the
  same kernel without positions, on sm_80 or sm_90.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import csrc_triton
from csrc_triton.architectures import ARCHITECTURES
from csrc_triton.launch import interpreting
from csrc_triton.specs import TRITON_TYPES, KernelSpec
from tools.compile.arguments import add_arguments, chosen, show
from tools.compile.machine_code import Code, Target, machine_code
from tools.compile.occupancy import blocks_per_multiprocessor
from tools.table import Table

TARGETS = (
    "cuda:80",
    "cuda:89",
    "cuda:90",
    "cuda:100",
    "cuda:120",
    "hip:gfx942",
    "hip:gfx950",
)
NO_SPILLS = frozenset({"sm_80", "sm_89", "sm_90"})
FAR_LOOP_COMPARED = frozenset({"sm_80", "sm_90"})
FAR_LOOP_LIMIT = 1.10


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    Attributes:
        target: such as `"cuda:90"`.
        dtype: of the activations.
        kernel: name of its `KernelSpec`.
        kind: "gemm", "attention" or "pointwise".
        code: what its machine code says; `None` when it did not compile.
        blocks: resident blocks of a multiprocessor.
        far_loop: instructions in the hot loop as a multiple of those of the plain twin.
        problems: what the checks found.
    """

    target: str
    dtype: str
    kernel: str
    kind: str
    code: Code | None
    blocks: int | None
    far_loop: float | None
    problems: tuple[str, ...]


def shipped_kernels(arch: str, dtype: str) -> list[KernelSpec]:
    """All kernels with a dtype, as they ship for model width 1024.

    Args:
        arch: such as `"sm_90"`.
        dtype: "float16", "bfloat16" or "float32".
    """
    return [spec for module in _kernel_modules() for spec in module.kernel_specs(arch, dtype)]


@functools.cache
def _kernel_modules() -> tuple[Any, ...]:
    """The modules that list kernels, those of forward passes first."""
    found = pkgutil.walk_packages(csrc_triton.__path__, f"{csrc_triton.__name__}.")
    names = sorted((name.endswith("backward"), name) for _, name, _ in found)
    modules = [importlib.import_module(name) for _, name in names]
    return tuple(module for module in modules if hasattr(module, "kernel_specs"))


def find_problems(
    spec: KernelSpec, arch: str, code: Code, blocks: int, far_loop: float | None
) -> Iterator[str]:
    """What is wrong with a kernel's machine code; nothing, if all is well."""
    if arch in NO_SPILLS and code.spills:
        yield f"{code.spills} instructions load or store spilled registers"
    has_product = spec.kind in ("gemm", "attention")
    on_tensor_cores = has_product and spec.dtype in ARCHITECTURES[arch].matrix_types
    if on_tensor_cores and not code.tensor_core:
        yield f"it is {spec.kind} and has no tensor-core instruction"
    limit = ARCHITECTURES[arch].block_shared_bytes
    if code.shared_bytes > limit:
        yield f"it needs {code.shared_bytes} bytes of shared memory; {arch} has {limit}"
    elif blocks == 0:
        yield f"a block of {spec.num_warps} warps with {code.registers} registers does not fit"
    if on_tensor_cores and spec.plain_twin is not None and arch in FAR_LOOP_COMPARED:
        if far_loop is None:
            yield f"its far loop, or that of {spec.plain_twin}, was not found"
        elif far_loop > FAR_LOOP_LIMIT:
            yield (
                f"its far loop has {far_loop:.2f} times the instructions of {spec.plain_twin}; "
                f"at most {FAR_LOOP_LIMIT:.2f} are allowed"
            )


def check_kernel(
    spec: KernelSpec, target: Target, others: Mapping[str, KernelSpec], cache: Path
) -> Row:
    """Compiles one kernel and checks its machine code.

    Args:
        spec: the kernel.
        target: the GPU.
        others: specs by name, among them the kernel's plain twin.
        cache: folder with the answers of earlier runs.
    """
    facts = (target.name, spec.dtype, spec.name, spec.kind)
    twin = others.get(spec.plain_twin) if spec.kind == "attention" and spec.plain_twin else None
    far_loop = None
    try:
        code = machine_code(spec, target, cache)
        plain = machine_code(twin, target, cache) if twin else None
    # Whatever the compiler and its passes raise belongs to this kernel; the others go on.
    except Exception as error:
        problem = f"it does not compile: {type(error).__name__}: {error}"
        return Row(*facts, None, None, None, (problem,))
    if plain and plain.hot_loop and code.hot_loop:
        far_loop = code.hot_loop / plain.hot_loop
    blocks = blocks_per_multiprocessor(
        target.arch,
        spec.num_warps,
        code.registers,
        code.shared_bytes,
        code.tensor_memory_columns,
    )
    problems = tuple(find_problems(spec, target.arch, code, blocks, far_loop))
    return Row(*facts, code, blocks, far_loop, problems)


_TABLE = Table(
    (
        ("target", 10),
        ("dtype", 8),
        ("kernel", 46),
        ("registers", 9),
        ("spills", 6),
        ("shared", 7),
        ("blocks", 6),
        ("tensor cores", 12),
        ("global loads", 28),
        ("hot loop", 8),
        ("vs plain", 8),
        ("check", 6),
    )
)


def table_line(row: Row) -> str:
    """A row of the table. "128 x4" among the loads: four load instructions of 128 bits a thread."""
    cells = [row.target, row.dtype, row.kernel]
    if row.code is None:
        cells += [""] * 8
    else:
        cells += [
            str(row.code.registers),
            str(row.code.spills),
            str(row.code.shared_bytes),
            str(row.blocks),
            ", ".join(f"{name} x{number}" for name, number in row.code.tensor_core.items()),
            ", ".join(f"{bits} x{number}" for bits, number in row.code.load_bits.items()),
            "" if row.code.hot_loop is None else str(row.code.hot_loop),
            "" if row.far_loop is None else f"{row.far_loop - 1:+.1%}",
        ]
    return _TABLE.line([*cells, "FAILED" if row.problems else "ok"])


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    for target in options.targets:
        for dtype in options.dtypes or TRITON_TYPES:
            specs = {spec.name: spec for spec in shipped_kernels(target.arch, dtype)}
            for name, spec in specs.items():
                if chosen(name, options.kernels):
                    yield check_kernel(spec, target, specs, options.cache)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile",
        description="Compiles every kernel as it ships and checks the machine code; no GPU needed.",
    )
    add_arguments(parser, TARGETS, ",".join(TRITON_TYPES))
    options = parser.parse_args(arguments)
    if interpreting():
        print("error: TRITON_INTERPRET is set, so nothing can be compiled", file=sys.stderr)
        return 2
    if not (rows := show(_rows(options), _TABLE, table_line, options)):
        return 2
    failed = [row for row in rows if row.problems]
    for row in failed:
        for problem in row.problems:
            print(f"\n{row.kernel}, {row.dtype}, {row.target}: {problem}")
    print(f"\n{len(rows)} kernels, {len(failed)} failed")
    return 1 if failed else 0
