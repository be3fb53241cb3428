"""What a lane found, a line of JSON for each test, and the tables that are made of it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90")
"""Those that the kernels can be executed for without a GPU."""
SUMMARY = ROOT / "docs" / "inside" / "executed.json"

PARTS = {
    "attention": (),
    "conv": ("norm",),
    "ctc": (),
    "fbank": (),
    "gemm": (),
    "norm": (),
}
"""Of `csrc_triton`, and which others each imports."""
OF_NO_PART = ("architectures", "functions", "launch")
"""What all import; a plan launches again what was launched before, and decides nothing."""

Rows = dict[str, dict[str, Any]]


@functools.cache
def source(part: str) -> str:
    """A digest of the files that decide what a part of `csrc_triton` computes, such as `gemm`."""
    folder = ROOT / "csrc_triton"
    files = [folder / f"{name}.py" for name in (part, *OF_NO_PART)]
    for name in (part, *PARTS[part]):
        files += sorted((folder / name).rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:16]


def sources(kernels: Iterable[str]) -> dict[str, str]:
    """The digests of what a row of kernels such as `csrc_triton.gemm.forward:_linear_kernel` says
    something of; of all, where it has none."""
    parts = {re.split("[.:]", kernel)[1] for kernel in kernels} or PARTS
    return {part: source(part) for part in sorted(parts)}


def write(path: Path, line: dict[str, Any]) -> None:
    """Appends a line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(paths: Iterable[Path]) -> tuple[Rows, list[str]]:
    """The newest row of each test that is of today's kernels, and the tests that were to run."""
    rows: Rows = {}
    planned: list[str] = []
    for path in paths:
        of_file: list[str] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the end of a run that was cut
                continue
            if "planned" in row:
                of_file = row["planned"]
            elif all(source(part) == digest for part, digest in row["sources"].items()):
                rows[row["test"]] = row
        planned += of_file
    return rows, planned


def table(rows: Rows) -> str:
    """A line for each kernel and dtype: cases, worst errors, and seconds of their tests.

    The variants of a kernel (what follows a slash in its name) share a line.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    seconds: dict[tuple[str, str], float] = {}
    for row in rows.values():
        keys = set()
        for record in row["records"]:
            key = (record["kernel"].partition("/")[0], record["dtype"])
            groups.setdefault(key, []).append(record)
            keys.add(key)
        for key in keys:
            seconds[key] = seconds.get(key, 0.0) + row["seconds"] / len(keys)

    lines = ["kernel                      dtype     cases  worst error  x PyTorch's  seconds"]
    for (kernel, dtype), records in sorted(groups.items()):
        ratios = [record["ratio"] for record in records if record["ratio"] is not None]
        ratio = f"{max(ratios):.2f}" if ratios else "exact" if _exact(records) else "-"
        worst = max(record["largest"] for record in records)
        lines.append(
            f"{kernel:<27} {dtype:<9} {len(records):>5}  {worst:>11.2e}  {ratio:>11}  "
            f"{seconds[kernel, dtype]:>7.1f}"
        )
    return "\n".join(lines)


def _exact(records: list[dict[str, Any]]) -> bool:
    return all(record["largest"] == 0 for record in records)


def summary(rows_by_target: dict[str, Rows]) -> list[dict[str, Any]]:
    """A row for each Triton kernel, target and dtype: what was launched, and how far off it was.

    The errors are those of comparisons of single operations. A model's are sums over all kernels.
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for target, rows in rows_by_target.items():
        for row in rows.values():
            if row["outcome"] != "passed":
                continue
            for ran in row["launches"]:
                key = (ran["kernel"], target, ran["dtype"])
                entry = found.setdefault(key, _empty(*key))
                entry["tests"] += 1
                entry["launches"] += ran["launches"]
                entry["instructions"] += ran["instructions"]
            for record in row["records"]:
                if record["kernel"].startswith("model"):
                    continue
                for kernel, dtype in record["ran"]:
                    entry = found[kernel, target, dtype]
                    entry["comparisons"] += 1
                    if record["ratio"] is None:
                        entry["error"] = max(entry["error"], record["largest"])
                    elif dtype != "float32":  # else it rounds nothing to 16 bits
                        entry["ratio"] = max(entry["ratio"] or 0.0, record["ratio"])
    for entry in found.values():
        entry.update({name: _short(entry[name]) for name in ("ratio", "error")})
    return [found[key] for key in sorted(found)]


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.3g}")


def _empty(kernel: str, target: str, dtype: str) -> dict[str, Any]:
    counts = dict.fromkeys(("tests", "launches", "instructions", "comparisons"), 0)
    of_what = {"kernel": kernel, "target": target, "dtype": dtype}
    return {**of_what, **counts, "ratio": None, "error": 0.0}
