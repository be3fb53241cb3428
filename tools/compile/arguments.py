"""The options and the output that `python -m tools.compile` and `python -m tools.verify` share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tools.compile.machine_code import default_cache
from tools.compile.shipped import DTYPES
from tools.compile.target import Target
from tools.table import Table

Row = TypeVar("Row", bound=Any)


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
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise argparse.ArgumentTypeError(f"it is {text!r}; known are {', '.join(DTYPES)}")
    return dtypes


def add_arguments(
    parser: argparse.ArgumentParser, targets: Sequence[str], default_dtypes: str
) -> None:
    """Adds `--targets`, `--dtypes` (`None` when it is not given), `--kernels`, `--json`, `--cache`.

    Args:
        parser: gets the options.
        targets: names of the default targets.
        default_dtypes: what is done without `--dtypes`, for its help.
    """
    parser.add_argument(
        "--targets",
        type=_targets,
        default=",".join(targets),
        help="default: %(default)s",
    )
    parser.add_argument("--dtypes", type=_dtypes, help=f"default: {default_dtypes}")
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


def chosen(name: str, texts: Sequence[str]) -> bool:
    """Whether `--kernels` with these texts means a kernel of this name."""
    return not texts or any(text in name for text in texts)


def show(
    rows: Iterable[Row], table: Table, line: Callable[[Row], str], options: argparse.Namespace
) -> list[Row]:
    """Prints a command's rows as they come and writes them to `--json`; says so if there are none.

    Args:
        rows: dataclasses.
        table: their columns.
        line: of the table, for a row.
        options: as parsed.
    """
    shown: list[Row] = []
    for row in rows:
        if not shown:
            print(table.head())
        shown.append(row)
        print(line(row), flush=True)
    if not shown:
        print(f"error: no kernel's name has {' or '.join(options.kernels)}", file=sys.stderr)
    elif options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in shown], indent=1) + "\n")
    return shown
