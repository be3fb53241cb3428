"""The command `w2vbert-fast doctor`: what is here, and whether it computes right."""

from __future__ import annotations

import dataclasses
import json
import sys

from w2vbert_fast.cli.messages import ITEMS_FAILED, write_line
from w2vbert_fast.cli.options import option

SHORT = "Check what runs here, and how."
HELP = (
    "Print what is installed, what this machine has, which implementation each operation would use "
    "and why, and the error and time of each against plain PyTorch. The exit status is 1 when a "
    "check failed."
)


@dataclasses.dataclass(kw_only=True)
class Printing:
    as_json: bool = option(False, "Print one JSON object.", "--json")


def command(printing: Printing) -> int:
    """Examine this machine and print what was found; the exit status."""
    from rich.console import Console
    from rich.table import Table

    from w2vbert_fast.doctor import examine

    found = examine()
    if printing.as_json:
        content = {**dataclasses.asdict(found), "passed": found.passed}
        content["packages"], content["machine"] = dict(found.packages), dict(found.machine)
        content["reasons"], content["tuned"] = dict(found.reasons), dict(found.tuned)
        write_line(json.dumps(content, indent=2))
        return 0 if found.passed else ITEMS_FAILED
    # Lines are not wrapped where the output is a file.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for title, rows in (("Installed", found.packages), ("Machine", found.machine)):
        console.print(title, style="bold")
        for name, value in rows:
            console.print(f"  {name:20} {value}", markup=False)
    for title, rows in (("Implementations", found.reasons), ("Tuned", found.tuned)):
        console.print(title, style="bold")
        for device, reason in rows:
            console.print(f"  {device:20} {reason}", markup=False, soft_wrap=True)
    table = Table(title="Self-check: relative error against plain PyTorch in float64")
    for column in ("operation", "device", "dtype", "implementation", "error", "limit", "ms", ""):
        table.add_column(column, justify="right" if column in ("error", "limit", "ms") else "left")
    for check in found.checks:
        table.add_row(
            check.operation,
            check.device,
            check.dtype,
            check.implementation,
            "" if check.error is None else f"{check.error:.1e}",
            f"{check.limit:.1e}",
            "" if check.milliseconds is None else f"{check.milliseconds:.2f}",
            "ok" if check.passed else "FAILED",
        )
    console.print(table)
    failed = [check for check in found.checks if not check.passed]
    for check in failed:
        where = f"{check.operation}, {check.device}, {check.dtype}"
        console.print(f"FAILED {where}: {check.failure}", markup=False, soft_wrap=True)
    console.print(f"{len(found.checks)} checks, {len(failed)} failed")
    return 0 if found.passed else ITEMS_FAILED
