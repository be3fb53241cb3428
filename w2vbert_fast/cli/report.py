"""The command `w2vbert-fast report`: the page of a job."""

from __future__ import annotations

from dataclasses import dataclass

from w2vbert_fast.cli.messages import write_line
from w2vbert_fast.cli.options import argument

SHORT = "Write a page about a job, its rows and its errors."
HELP = (
    "Write report.html into the folder of a job: rows, hours, speed, what failed, and a table of "
    "all rows, which sorts, searches and plays. It is one file that opens without a server. Jobs "
    "write theirs at the end; this is for one that runs or was stopped, and for older ones."
)


@dataclass(kw_only=True)
class Folder:
    folder: str = argument("Folder of a job.", metavar="DIR")


def command(folder: Folder) -> int:
    """Write the page; the exit status."""
    from w2vbert_fast.inference.jobs.report import write_report

    write_line(str(write_report(folder.folder)))
    return 0
