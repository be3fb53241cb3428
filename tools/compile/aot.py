"""Compiles every kernel as it ships, for GPUs that need not be there, and checks the machine code.

    python -m tools.compile --targets cuda:80,cuda:90,hip:gfx942 --json rows.json

prints one row for each kernel, target and dtype. The exit status is 1 when a kernel

* does not compile;
* spills registers on sm_80, sm_89 or sm_90;
* multiplies what tensor cores multiply, and has no tensor-core instruction;
* needs more shared memory than the target has, or does not fit a multiprocessor otherwise;
* is attention with positions and spends over 10 % more instructions on a far key block than the
  same kernel without positions, on sm_80 or sm_90.

The kernels are those that the launchers ask for (`tools.compile.shipped`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csrc_triton.architectures import ARCHITECTURES
from csrc_triton.launch import interpreting
from tools.compile.arguments import add_arguments, chosen, show
from tools.compile.machine_code import Code, machine_code
from tools.compile.occupancy import blocks_per_multiprocessor
from tools.compile.shipped import DTYPES, Shipped, shipped_kernels
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
PLAIN_TWINS = dict.fromkeys(
    ("shaw_attention_fwd/relative_key", "shaw_attention_fwd/relative_key_seqused"),
    "shaw_attention_fwd/no_positions",
)
"""What a kernel's hot loop is compared with: the same kernel without its special part."""


@dataclass(frozen=True)
class Row:
    """One kernel on one target.

    Attributes:
        target: such as `"cuda:90"`.
        dtype: of the activations.
        kernel: name of the `Shipped` one.
        code: what its machine code says; `None` when it did not compile.
        blocks: resident blocks of a multiprocessor.
        far_loop: instructions in the hot loop as a multiple of those of the plain twin.
        problems: what the checks found.
    """

    target: str
    dtype: str
    kernel: str
    code: Code | None
    blocks: int | None
    far_loop: float | None
    problems: tuple[str, ...]


def find_problems(
    kernel: Shipped, code: Code, blocks: int, far_loop: float | None
) -> Iterator[str]:
    """What is wrong with a kernel's machine code; nothing, if all is well."""
    arch, warps = kernel.target.arch, kernel.request.options["num_warps"]
    if arch in NO_SPILLS and code.spills:
        yield f"{code.spills} instructions load or store spilled registers"
    on_tensor_cores = [name for name in code.products if name in ARCHITECTURES[arch].matrix_types]
    if on_tensor_cores and not code.tensor_core:
        yield f"it multiplies {' and '.join(on_tensor_cores)} without a tensor-core instruction"
    limit = ARCHITECTURES[arch].block_shared_bytes
    if code.shared_bytes > limit:
        yield f"it needs {code.shared_bytes} bytes of shared memory; {arch} has {limit}"
    elif blocks == 0:
        yield f"a block of {warps} warps with {code.registers} registers does not fit"
    twin = PLAIN_TWINS.get(kernel.name)
    if on_tensor_cores and twin is not None and arch in FAR_LOOP_COMPARED:
        if far_loop is None:
            yield f"its far loop, or that of {twin}, was not found"
        elif far_loop > FAR_LOOP_LIMIT:
            yield (
                f"its far loop has {far_loop:.2f} times the instructions of {twin}; "
                f"at most {FAR_LOOP_LIMIT:.2f} are allowed"
            )


def check_kernel(kernel: Shipped, others: Mapping[str, Shipped], cache: Path) -> Row:
    """Compiles one kernel and checks its machine code.

    Args:
        kernel: what is checked.
        others: kernels of that target and dtype by name, among them its plain twin.
        cache: folder with the answers of earlier runs.
    """
    facts = (kernel.target.name, kernel.dtype, kernel.name)
    twin = others.get(PLAIN_TWINS.get(kernel.name, ""))
    far_loop = None
    try:
        code = machine_code(kernel.request, cache)
        plain = machine_code(twin.request, cache) if twin else None
    # Whatever the compiler and its passes raise belongs to this kernel; the others go on.
    except Exception as error:
        problem = f"it does not compile: {type(error).__name__}: {error}"
        return Row(*facts, None, None, None, (problem,))
    if plain and plain.hot_loop and code.hot_loop:
        far_loop = code.hot_loop / plain.hot_loop
    blocks = blocks_per_multiprocessor(
        kernel.target.arch,
        kernel.request.options["num_warps"],
        code.registers,
        code.shared_bytes,
        code.tensor_memory_columns,
    )
    return Row(*facts, code, blocks, far_loop, tuple(find_problems(kernel, code, blocks, far_loop)))


_TABLE = Table(
    (
        ("target", 10),
        ("dtype", 8),
        ("kernel", 52),
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
        for dtype in options.dtypes or DTYPES:
            kernels = {kernel.name: kernel for kernel in shipped_kernels(target, dtype)}
            for name, kernel in kernels.items():
                if chosen(name, options.kernels):
                    yield check_kernel(kernel, kernels, options.cache)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile",
        description="Compiles every kernel as it ships and checks the machine code; no GPU needed.",
    )
    add_arguments(parser, TARGETS, ",".join(DTYPES))
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
