"""Draws measurements and the cost ledger as one HTML page.

    python -m bench.report bench/results/cpu.json --out report.html

The page needs no other file and no network. Files of measurements come from `python -m bench`
(schema "w2vbert-bench/v1"); one of the ledger (`python -m bench.ledger --json`) is taken as it is,
and without one the ledger is counted anew, which needs transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.ledger.forward import SCHEMA as LEDGER_SCHEMA, ledger as count_ledger
from bench.report.page import ledger_picture, page, speed_picture
from bench.rows import Results, parse, read_json


def load(files: Sequence[Path]) -> tuple[list[Results], dict[str, Any] | None]:
    """The measurements and the ledger in some files.

    Raises:
        ValueError: a file cannot be read or has another schema, or two hold a ledger.
    """
    results: list[Results] = []
    ledger: dict[str, Any] | None = None
    for file in files:
        raw = read_json(file)
        if isinstance(raw, dict) and raw.get("schema") == LEDGER_SCHEMA:
            if ledger is not None:
                raise ValueError(f"{file} is a second cost ledger; one page shows one")
            ledger = raw
        else:
            results.append(parse(raw, str(file)))
    return results, ledger


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSON files of results, or of a ledger")
    parser.add_argument("--out", type=Path, required=True, help="the HTML page to write")
    parser.add_argument(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="also write speed_cpu.svg and ledger.svg there",
    )
    parser.add_argument("--no-ledger", action="store_true", help="leave the cost ledger out")
    options = parser.parse_args(argv)
    try:
        results, ledger = load(options.files)
        if options.no_ledger:
            ledger = None
        elif ledger is None:
            ledger = count_ledger()
        write(options.out, page(results, ledger))
        if options.pictures is not None:
            _write_pictures(options.pictures, results, ledger)
    except (ValueError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    return 0


def _write_pictures(
    folder: Path, results: Sequence[Results], ledger: dict[str, Any] | None
) -> None:
    on_cpu = [part for part in results if not part.machine.get("gpu")]
    speed = speed_picture(on_cpu[0]) if on_cpu else None
    if speed is not None:
        write(folder / "speed_cpu.svg", speed)
    if ledger is not None:
        write(folder / "ledger.svg", ledger_picture(ledger))


def write(file: Path, text: str) -> None:
    """Writes a file, and its folder where there is none, and says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    print(f"wrote {file} ({len(text.encode()) / 1024:.0f} KB)")


if __name__ == "__main__":
    raise SystemExit(main())
