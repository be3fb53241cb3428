"""`python -m tools.virtual_gpu --target sm_90 SCRIPT.py [ARGS]`: see README.md."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .count import Table
from .driver import SHARED_BYTES, Run, activated
from .executor import ExecutionError, Executor
from .faults import UnsupportedError
from .global_memory import Checks
from .record import Launch, Recorder


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="Run a Python script, its Triton kernels compiled for a GPU that is not there, "
        "executed and checked. Its tensors are on the CPU.",
    )
    made.add_argument("--target", required=True, choices=list(SHARED_BYTES))
    made.add_argument(
        "--record", metavar="FILE", type=Path, help="write every launch, one line of JSON each"
    )
    made.add_argument("--count", action="store_true", help="print a table of what the launches did")
    made.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[field.name for field in dataclasses.fields(Checks)],
        metavar="CHECK",
        help="leave out a check: %(choices)s",
    )
    made.add_argument("script", type=Path, metavar="SCRIPT.py")
    made.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parse = parser()
    options = parse.parse_args(arguments)
    if not options.script.is_file():
        parse.error(f"{options.script} is not a file")
    table = Table()
    checks = Checks(**dict.fromkeys(options.without, False))
    with contextlib.ExitStack() as stack:
        uses: list[Run] = []
        if options.record is not None:
            uses.append(Recorder(stack.enter_context(options.record.open("w"))))
        uses.append(Executor(checks, table.add))

        def run(launch: Launch) -> None:
            for use in uses:
                use(launch)

        stack.enter_context(activated(options.target, run))
        # As Python itself runs a script: its folder comes first where modules are looked for.
        sys.argv = [str(options.script), *options.arguments]
        sys.path.insert(0, str(options.script.resolve().parent))
        try:
            runpy.run_path(str(options.script), run_name="__main__")
        except (ExecutionError, UnsupportedError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    if options.count:
        print(table.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
