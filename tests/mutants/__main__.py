"""Mutants of every kernel as compiled: which are noticed when they are executed.

    python -m tests.mutants [--out FOLDER] [--orders N] [--values N] [--only OPERATION] [--table]

Of each kernel and target all mutants of synchronisation (or N) and N of values, drawn with a fixed
seed, at small sizes; what lives there, at larger ones, where the kernel is the same. Each is a row
of `FOLDER/rows.jsonl`: ended and started again, it goes on with the next. Rows of kernels that are
compiled otherwise by now are dropped when a target has been gone through. In the end it writes
`docs/inside/mutants.md` (`--table`: of the rows there are, and runs nothing), and fails where a
mutant lives that `explanations.toml` says nothing of.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.mutants.table import write

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
TARGETS = ("sm_80", "sm_90")
VALUES = 40


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--orders", type=int, help="of synchronisation, of each kernel (all)")
    parser.add_argument(
        "--values", type=int, default=VALUES, help="of values, of each kernel (%(default)s)"
    )
    parser.add_argument("--only", default="", help="operations in whose name this is")
    parser.add_argument("--target", choices=TARGETS, action="append", help="both, if not given")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args(arguments)
    rows = options.out / "rows.jsonl"
    if not options.table:
        os.environ.setdefault("TRITON_CACHE_DIR", str(options.out / "triton"))
        rows.parent.mkdir(parents=True, exist_ok=True)
        drawn = options.orders, options.values
        run(rows, options.target or TARGETS, drawn, options.only)
    wrong = write(read(rows))
    for line in wrong:
        print(line)
    return int(bool(wrong))


def read(rows: Path) -> list[dict[str, Any]]:
    if not rows.exists():
        return []
    return [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")]


def run(rows: Path, targets: Sequence[str], drawn: tuple[int | None, int], only: str) -> None:
    """Appends a row for every mutant that has none, and drops those of kernels that are no more."""
    done = {key(row) for row in read(rows)}
    for target in targets:
        compiled: dict[str, dict[int, str]] = {}
        with rows.open("a") as file:
            for row in tried(target, drawn, only, done, compiled):
                file.write(json.dumps(row) + "\n")
                file.flush()
        if not only:
            left = [r for r in read(rows) if r["target"] != target or is_of(r, compiled)]
            rows.write_text("".join(json.dumps(row) + "\n" for row in left))


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("target", "ptx", "operator", "line", "after"))


def statements(ptx: str) -> dict[int, str]:
    """A kernel's statements, by the line that each is on."""
    from tools.virtual_gpu.ptx import parse

    return {i.line: i.text for i in parse(ptx).instructions}


def is_of(row: dict[str, Any], compiled: dict[str, dict[int, str]]) -> bool:
    """Whether the kernel is compiled as it was then, with the statement on the same line: lines of
    PTX move where the source is divided into functions otherwise."""
    return bool(compiled.get(row["ptx"], {}).get(row["line"]) == row["before"])


def code(source: str) -> str:
    """The source line's own text; its number changes with every edit of the file."""
    path, _, line = source.partition(" ")[0].rpartition(":")
    _, ours, inside = path.rpartition("/csrc_triton/")
    file = ROOT / "csrc_triton" / inside if ours else Path(path)
    if not file.is_file():
        return ""
    return file.read_text().splitlines()[int(line) - 1].strip()


def tried(
    target: str,
    drawn: tuple[int | None, int],
    only: str,
    done: set[tuple[Any, ...]],
    seen: dict[str, dict[int, str]],
) -> Iterator[dict[str, Any]]:
    """The mutants that are not `done`, as rows; adds all kernels to `seen`: by a digest of their
    statements, which a source that has moved does not change, these."""
    import torch

    from tests.helpers.operations import SMALL
    from tests.mutants.cases import NAMES, Case, larger
    from tools.virtual_gpu.mutants import SYNCHRONISATION, Mutant, mutants

    torch.set_num_threads(1)
    for operation in (name for name in NAMES if only in name):
        case = Case(operation, SMALL, target)
        long: list[Case] = []
        for ptx, name in {ran.launch.ptx: ran.launch.name for ran in case.ran}.items():
            texts = statements(ptx)
            digest = hashlib.sha256("\n".join(texts.values()).encode()).hexdigest()[:12]
            if digest in seen:
                continue
            seen[digest] = texts
            kinds: tuple[list[Mutant], list[Mutant]] = ([], [])
            for mutant in mutants(ptx):
                kinds[mutant.operator not in SYNCHRONISATION].append(mutant)
            chosen = []
            for some, number in zip(kinds, drawn, strict=True):
                random.Random(f"{operation} {name}").shuffle(some)
                chosen += some[:number]
            for mutant in chosen:
                row = {
                    **{"target": target, "operation": operation, "kernel": name, "ptx": digest},
                    **dataclasses.asdict(mutant),
                    "source": re.sub(r"\S*/(?=[\w.]+:\d+)", "", mutant.source),
                    "code": code(mutant.source),
                    "of": len(kinds[1]),
                }
                if key(row) in done:
                    continue
                outcome = case.tried(ptx, mutant)
                if not outcome.noticed:
                    long = long or [
                        Case(operation, sizes, target, strided=True) for sizes in larger(operation)
                    ]
                    for other in long:
                        if not outcome.noticed and any(ran.launch.ptx == ptx for ran in other.ran):
                            second = other.tried(ptx, mutant)
                            outcome = min(outcome, second, key=lambda one: one.rank)
                yield row | dataclasses.asdict(outcome)


if __name__ == "__main__":
    sys.exit(main())
