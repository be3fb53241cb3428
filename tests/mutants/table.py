"""The page of mutants, from the rows of a run and the explanations of those that live."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomllib

from tools.virtual_gpu.mutants import SYNCHRONISATION

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "inside" / "mutants.md"
EXPLANATIONS = FOLDER / "explanations.toml"
NOTICED = ("fault", "wrong")
LIVES = ("unchanged", "within the limit")
LEAST = {"synchronisation": 0.95, "values": 0.90}
"""How many of the mutants that change something must be noticed."""

# What a fault says -> the check that found it.
CHECKS = {
    "garbage": "depends on the order of blocks",
    "race in shared memory": "race in shared memory|still copies|no fence.proxy",
    "race of blocks": "race of blocks",
    "race in global memory": "race in global memory",
    "bounds": "outside of every tensor|of shared memory$",
    "alignment": "not aligned",
    "written once": "is written twice",
    "written whole": "are never written",
    "waits": "was waited for|(wgmma|bulk) still reads",
    "fences": "after the last wgmma.fence",
    "barriers": "not all threads reach",
    "warps that act together": "by a part of|disagree",
    "does not end": "does not end",
    "others": "",
}


def family(row: dict[str, Any]) -> str:
    return "synchronisation" if row["operator"] in SYNCHRONISATION else "values"


def explained(row: dict[str, Any], explanations: Iterable[dict[str, str]]) -> dict[str, str] | None:
    """The first explanation whose every field but `why` is found in the row's."""
    return next(
        (
            one
            for one in explanations
            if all(re.search(text, str(row[name])) for name, text in one.items() if name != "why")
        ),
        None,
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _share(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    noticed = sum(row["how"] in NOTICED for row in rows)
    return noticed, noticed + sum(row["how"] in LIVES for row in rows)


def _percent(noticed: int, of: int) -> str:
    return f"{100 * noticed / of:.1f} %" if of else ""


def kernels(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each kernel, and one for all of a target."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["kernel"]), []).append(row)
        groups.setdefault((row["target"], "**all**"), []).append(row)
    lines = []
    for (target, kernel), mine in sorted(groups.items()):
        line = [target, kernel if "*" in kernel else f"`{kernel}`", len({r["ptx"] for r in mine})]
        for name in LEAST:
            some = [row for row in mine if family(row) == name]
            noticed, of = _share(some)
            line += [len(some), len(some) - of, f"{noticed} of {of}", _percent(noticed, of)]
        lines.append(line)
    drawn = ["drawn", "equal or not reached", "noticed", ""]
    return markdown(["target", "kernel", "compiled", *drawn, *drawn], lines)


def by_check(rows: Sequence[dict[str, Any]]) -> str:
    """What noticed them."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in LEAST}
    for row in rows:
        if row["how"] == "wrong":
            counts[family(row)]["the result"] += 1
        elif row["how"] == "fault":
            name = next(n for n, pattern in CHECKS.items() if re.search(pattern, row["said"]))
            counts[family(row)][name] += 1
    names = sorted({n for c in counts.values() for n in c}, key=lambda n: -counts["values"][n])
    return markdown(["noticed by", *counts], [[n, *(c[n] for c in counts.values())] for n in names])


def living(rows: Sequence[dict[str, Any]], explanations: list[dict[str, str]]) -> str:
    """A line for every mutant that lives, those that are alike in one."""
    groups: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        if row["how"] in LIVES:
            found = explained(row, explanations)
            why = found["why"] if found else "**unexplained**"
            change = row["before"].split()[0] if not row["after"] else ""
            if not change:
                change = re.sub(r"\s+", " ", f"{row['before']} -> {row['after']}")
                change = re.sub(r"%\w+", "%", change)
            groups[
                row["target"], row["kernel"], row["operator"], change, row["code"], row["how"], why
            ] += 1
    lines = [
        [target, f"`{kernel}`", operator, f"`{change}`", f"`{code}`" if code else "", how, n, why]
        for (target, kernel, operator, change, code, how, why), n in sorted(groups.items())
    ]
    header = ["target", "kernel", "operator", "statement", "source", "outcome", "mutants", "why"]
    return markdown(header, lines)


def write(rows: Sequence[dict[str, Any]], page: Path = PAGE) -> list[str]:
    """Writes the page; what is wrong with it."""
    explanations: list[dict[str, str]] = tomllib.loads(EXPLANATIONS.read_text())["explanation"]
    alive = [row for row in rows if row["how"] in LIVES]
    wrong = [
        f"unexplained: {row['target']} {row['kernel']}: {row['operator']}: line {row['line']}: "
        f"{row['before']} -> {row['after']} ({row['source']}: {row['code']}): {row['how']}"
        for row in alive
        if explained(row, explanations) is None
    ]
    used = [explained(row, explanations) for row in alive]
    wrong += [f"explains nothing: {one}" for one in explanations if one not in used]
    for name, least in LEAST.items():
        noticed, of = _share([row for row in rows if family(row) == name])
        if of and noticed < least * of:
            wrong.append(f"{name}: only {noticed} of {of} are noticed")
    text = HEAD.format(
        synchronisation=_said(rows, "synchronisation"),
        values=_said(rows, "values"),
        kernels=kernels(rows),
        checks=by_check(rows),
        living=living(rows, explanations),
    )
    page.write_text(text, encoding="utf-8")
    return wrong


def _said(rows: Sequence[dict[str, Any]], name: str) -> str:
    some = [row for row in rows if family(row) == name]
    noticed, of = _share(some)
    return f"{noticed} of {of} ({_percent(noticed, of)}; {len(some) - of} more change nothing)"


HEAD = """\
# Mutants

Written by `python -m tests.mutants` (`make mutants`): every kernel as compiled in bfloat16, with
one statement of its PTX changed, executed with all checks ([what they are](virtual_gpu.md)).
Of synchronisation: a barrier, wait, commit or fence left out, or a wait for one group less. Of
values: a mask left out, two operands or two registers of a vector swapped, a constant changed. Of
both a number of each kernel is drawn with a fixed seed. A kernel that is not in the table was not
tried yet: the run goes on where it was ended.

Noticed: synchronisation {synchronisation}, values {values}.

*Noticed*: a check faults, or a result of the operation is further from float64 than the tests let
it be. *Equal or not reached*: in these shapes the statement is not executed, or does what the one
before did: the same values in every thread, a mask that is never off, a barrier, wait, commit or
fence that no access written down needs (`tools/virtual_gpu/trace.py`). They count nowhere.

{kernels}
## What noticed them

{checks}
## Those that live

*unchanged*: all bytes of all results are as without the mutant; *within the limit*: some are not.

{living}"""
