"""What the command line says: lines of output, messages for the user, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

PROGRAM = "w2vbert-fast"
# Exit statuses, besides 0.
ITEMS_FAILED = 1
NOT_STARTED = 2
# What an entry of a list in an error begins with.
_ENTRY = "  "


def one_line(text: str) -> str:
    """Replace what would break a line or a column by its escape, as \\n, \\t or \\udcff."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def write_line(line: str) -> None:
    """Write a line of output as UTF-8, whatever the locale says, and at once."""
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()


def report(message: str) -> None:
    """Print a message for the user."""
    try:
        print(f"{PROGRAM}: {message}", file=sys.stderr, flush=True)
    except OSError:
        # Nobody reads it. What is left in its buffer would change the program's exit status.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def fail(error: Exception) -> NoReturn:
    """Report an error that leaves nothing to do, and end the program.

    It is one line, but for those that begin with two spaces, the entries of a list.
    """
    lines: list[str] = []
    for line in str(error).splitlines():
        text = one_line(" ".join(line.split()))
        if lines and not line.startswith(_ENTRY):
            lines[-1] = f"{lines[-1]} {text}".rstrip()
        else:
            lines.append(_ENTRY + text if lines else text)
    report("\n".join(lines).strip() or type(error).__name__)
    sys.exit(NOT_STARTED)


@contextlib.contextmanager
def log_shown(talkative: str, *, below_progress: bool = False) -> Iterator[None]:
    """Show what the package logs for users, such as that a batch did not fit into memory.

    Args:
        talkative: the logger that is shown from INFO on; of all others of the package warnings are.
        below_progress: begin a new line on a terminal, below the one that shows progress.
    """

    class Reporter(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if below_progress and sys.stderr.isatty():
                print(file=sys.stderr)
            report(record.getMessage())

    log, detailed = logging.getLogger("w2vbert_fast"), logging.getLogger(talkative)
    handler = Reporter(logging.INFO)
    before = log.propagate, detailed.level
    log.propagate = False
    log.addHandler(handler)
    detailed.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before[0]
        detailed.setLevel(before[1])
