"""Compiles every kernel as it ships, for GPUs that need not be there, and checks the machine code.

    python -m csrc_triton.aot --targets cuda:80,cuda:90,hip:gfx942 --json rows.json

prints one row for each kernel, target and dtype. The exit status is 1 when a kernel

* does not compile;
* spills registers on sm_80, sm_89 or sm_90;
* is a matrix product or attention and has no tensor-core instruction on sm_80 or newer, or on AMD;
* needs more shared memory than the target has, or does not fit a multiprocessor otherwise;
* is attention with positions and spends over 10 % more instructions on a far key block than the
  same kernel without positions, on sm_80 or sm_90.

With `--verify` it asks a static verifier about each kernel instead: see `verify`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .machine_code import Code, Target, default_cache, machine_code
from .occupancy import LIMITS, blocks_per_multiprocessor
from .runtime import interpreting
from .specs import TRITON_TYPES, KernelSpec
from .verify import TIMEOUT, available, verify_kernel
from .verify import Row as VerifyRow
from .verify_equality import equalities

FAMILIES = (
    "attention",
    "linear",
    "conv",
    "norm",
    "fbank",
    "ctc",
    "attention_backward",
    "linear_backward",
    "conv_backward",
    "norm_backward",
)
TARGETS = (
    "cuda:80",
    "cuda:89",
    "cuda:90",
    "cuda:100",
    "cuda:120",
    "hip:gfx942",
    "hip:gfx950",
)
VERIFY_TARGETS = ("cuda:80", "cuda:90", "cuda:100")
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
    modules = [importlib.import_module(f".{family}", __package__) for family in FAMILIES]
    return [spec for module in modules for spec in module.kernel_specs(arch, dtype)]


def find_problems(
    spec: KernelSpec, arch: str, code: Code, blocks: int, far_loop: float | None
) -> Iterator[str]:
    """What is wrong with a kernel's machine code; nothing, if all is well."""
    if arch in NO_SPILLS and code.spills:
        yield f"{code.spills} instructions load or store spilled registers"
    if spec.kind in ("gemm", "attention") and arch != "sm_75" and not code.tensor_core:
        yield f"it is {spec.kind} and has no tensor-core instruction"
    limit = LIMITS[arch].block_shared_bytes
    if code.shared_bytes > limit:
        yield f"it needs {code.shared_bytes} bytes of shared memory; {arch} has {limit}"
    elif blocks == 0:
        yield f"a block of {spec.num_warps} warps with {code.registers} registers does not fit"
    if spec.kind == "attention" and spec.plain_twin is not None and arch in FAR_LOOP_COMPARED:
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


_COLUMNS = (
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


def _line(cells: Iterable[str]) -> str:
    padded = (f"{cell:<{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    return f"| {' | '.join(padded)} |"


def table_head() -> str:
    """The first two lines of the table, in Markdown."""
    return "\n".join(
        (_line(name for name, _ in _COLUMNS), _line("-" * width for _, width in _COLUMNS))
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
    return _line([*cells, "FAILED" if row.problems else "ok"])


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _targets(text: str) -> list[Target]:
    try:
        targets = [Target.parse(name) for name in _listed(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not targets:
        raise argparse.ArgumentTypeError("no target is named")
    return targets


def _dtypes(text: str) -> list[str]:
    dtypes = _listed(text)
    if not dtypes or not set(dtypes) <= set(TRITON_TYPES):
        raise argparse.ArgumentTypeError(f"it is {text!r}; known are {', '.join(TRITON_TYPES)}")
    return dtypes


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a number above 0")
    return seconds


_VERIFY_COLUMNS = (
    ("target", 9),
    ("dtype", 8),
    ("kernel", 38),
    ("claim", 8),
    ("state", 22),
    ("seconds", 7),
    ("why", 0),
)


def verify_table_line(row: VerifyRow) -> str:
    """A row of the verifier's table, in Markdown."""
    state = f"{row.state} (allowed)" if row.allowed else row.state
    cells = (row.target, row.dtype, row.kernel, row.claim, state, f"{row.seconds:.1f}")
    padded = [f"{c:<{w}}" for c, (_, w) in zip((*cells, row.reason), _VERIFY_COLUMNS, strict=True)]
    return f"| {' | '.join(padded)} |"


def _verify_rows(options: argparse.Namespace) -> Iterator[VerifyRow]:
    for target in options.targets:
        wanted = options.dtypes or ["bfloat16", "float32"]
        seen: set[str] = set()
        for dtype in wanted:
            for spec in shipped_kernels(target.arch, dtype):
                family = spec.name.split("/")[0]
                if options.dtypes is None and dtype == "float32" and family in seen:
                    continue
                if dtype == "bfloat16":
                    seen.add(family)
                if _chosen(spec.name, options.kernels):
                    yield verify_kernel(spec, target, options.cache, options.timeout)
        if "float32" in wanted and target.gpu.backend == "cuda":
            for case in equalities(target.arch):
                if _chosen(case.spec.name, options.kernels):
                    yield verify_kernel(case.spec, target, options.cache, options.timeout, case)


def _chosen(name: str, texts: Sequence[str]) -> bool:
    return not texts or any(text in name for text in texts)


def _verify(options: argparse.Namespace) -> int:
    """`--verify`; returns the exit status."""
    if not available():
        print("error: --verify needs sentryward: pip install 'w2vbert-fast[verify]'",
              file=sys.stderr)  # fmt: skip
        return 2
    rows: list[VerifyRow] = []
    for row in _verify_rows(options):
        if not rows:
            print("| " + " | ".join(f"{n:<{w}}" for n, w in _VERIFY_COLUMNS) + " |")
            print("| " + " | ".join("-" * max(w, 3) for _, w in _VERIFY_COLUMNS) + " |")
        rows.append(row)
        print(verify_table_line(row), flush=True)
    if not rows:
        print(f"error: no kernel's name has {' or '.join(options.kernels)}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    counts = {state: sum(row.state == state for row in rows) for state in _VERIFY_STATES}
    allowed = [row for row in rows if row.allowed]
    if allowed:
        print("\nrefuted and allowed, because threads store one value to one address:")
    for row in allowed:
        print(f"  {row.kernel}, {row.dtype}, {row.target}: {', '.join(row.duplicates)}")
    print(
        f"\n{len(rows)} questions: {counts['proved']} proved, {counts['refuted']} refuted "
        f"({len(allowed)} of them allowed), {counts['not decided']} not decided"
    )
    return 1 if any(row.failed for row in rows) else 0


_VERIFY_STATES = ("proved", "refuted", "not decided")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m csrc_triton.aot",
        description="Compiles every kernel as it ships and checks the machine code; no GPU needed.",
    )
    parser.add_argument(
        "--targets",
        type=_targets,
        help=f"default: {','.join(TARGETS)}; with --verify {','.join(VERIFY_TARGETS)}",
    )
    parser.add_argument(
        "--dtypes",
        type=_dtypes,
        help=f"default: {','.join(TRITON_TYPES)}; with --verify bfloat16, and float32 for what "
        "exists in no other",
    )
    parser.add_argument(
        "--kernels",
        metavar="TEXT,...",
        type=_listed,
        default=[],
        help="only kernels with one of these texts in their names",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--cache",
        metavar="FOLDER",
        type=Path,
        default=default_cache(),
        help="answers of earlier runs, by kernel source, target and options (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="prove each kernel free of races and its barriers right, and what is possible equal "
        "to PyTorch in real arithmetic, at a small launch (needs sentryward). A refutation makes "
        "the exit status 1, unless threads that store one value to one address are all there is "
        "and the kernel is listed for it; 'not decided' is counted apart, is no pass, and does "
        "not make it 1",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=TIMEOUT,
        help="for one proof of --verify; past it, it is not decided (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if options.targets is None:
        options.targets = _targets(",".join(VERIFY_TARGETS if options.verify else TARGETS))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments(arguments)
    if interpreting():
        print("error: TRITON_INTERPRET is set, so nothing can be compiled", file=sys.stderr)
        return 2
    if options.verify:
        return _verify(options)
    rows: list[Row] = []
    for target in options.targets:
        for dtype in options.dtypes or TRITON_TYPES:
            specs = {spec.name: spec for spec in shipped_kernels(target.arch, dtype)}
            for name, spec in specs.items():
                if not _chosen(name, options.kernels):
                    continue
                if not rows:
                    print(table_head())
                rows.append(check_kernel(spec, target, specs, options.cache))
                print(table_line(rows[-1]), flush=True)
    if not rows:
        print(f"error: no kernel's name has {' or '.join(options.kernels)}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    failed = [row for row in rows if row.problems]
    for row in failed:
        for problem in row.problems:
            print(f"\n{row.kernel}, {row.dtype}, {row.target}: {problem}")
    print(f"\n{len(rows)} kernels, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
