"""A page in one file: facts, curves, a table that sorts and searches, recordings that can be heard.

All that a page shows lies in it as compressed JSON, in blocks of rows, and is put on the screen as
text: nothing of it is ever read as HTML. Its policy of content lets it load nothing but recordings,
by their relative paths. Rows are written as they come, so that memory does not grow with them.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from w2vbert_fast.checkpoints.files import staged_file

BLOCK_ROWS = 1000

KINDS = ("text", "number", "seconds", "share")
"""What a column holds: text, a number, a time, or a share from 0 to 1."""


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: its heading.
        kind: one of `KINDS`.
        small: it is shown for the chosen row only.
    """

    title: str
    kind: str = "text"
    small: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        cells: a value for each column; None: there is none.
        failed: it is a row of an error.
        audio: the recording's path; None: there is no file.
        offset: where the row begins in it, in seconds.
        seconds: length of the row; None: to the end.
        words: texts, starts and ends in seconds of the recording, and confidences from 0 to 1.
    """

    cells: Sequence[Any]
    failed: bool = False
    audio: str | None = None
    offset: float = 0.0
    seconds: float | None = None
    words: Sequence[tuple[str, float, float, float | None]] = ()


@dataclass(frozen=True)
class Fact:
    """A line of the head: a name and a value, both text."""

    name: str
    value: str


@dataclass(frozen=True)
class Chart:
    """A curve; or with `column` a histogram of one of the table, which the page counts itself.

    Attributes:
        title: what it shows.
        x, y: what the axes show, with units.
        lines: points by the name of the line.
        column: number of the table's column.
    """

    title: str
    x: str = ""
    y: str = ""
    lines: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    column: int | None = None


@dataclass(frozen=True)
class Findings:
    """A table of what was found, with numbers and an example of each.

    Attributes:
        title: what it lists.
        entries: name, number and example of each.
        unit: of the numbers.
        search: a click on a name looks for it in the table of rows.
    """

    title: str
    entries: Sequence[tuple[str, int, str]]
    unit: str = ""
    search: bool = False


@dataclass
class Page:
    """What stands above and below the table; it is read after the last row.

    Attributes:
        title: of the page.
        columns: of the table.
        facts: lines of the head.
        charts: curves and histograms.
        findings: tables of what was found.
        sort: number of the column that the table is sorted by at first; None: as rows come.
        descending: the largest value first.
    """

    title: str
    columns: Sequence[Column]
    facts: list[Fact] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    findings: list[Findings] = field(default_factory=list)
    sort: int | None = None
    descending: bool = False


def write_page(
    path: Path, page: Page, rows: Iterable[Row], finish: Callable[[], None] | None = None
) -> None:
    """Write a page; a reader finds the old one or the new, never a part of one.

    Args:
        path: the file.
        page: what stands around the table.
        rows: of the table; read once, a block at a time.
        finish: called after the last row, to complete `page`.

    Raises:
        OSError: the file cannot be written.
    """
    head, _, foot = _template().partition("{data}")
    folder = path.parent.resolve()
    with staged_file(path) as staged:
        with staged.path.open("w", encoding="utf-8") as file:
            file.write(head.replace("{title}", html.escape(page.title)))
            for block in _blocks(rows):
                file.write(_script("rows", [_row(row, folder) for row in block]))
                file.write(_script("words", [_words(row) for row in block]))
            if finish is not None:
                finish()
            file.write(_script("page", asdict(page)))
            file.write(foot)
        staged.commit()


def _blocks(rows: Iterable[Row]) -> Iterable[list[Row]]:
    iterator = iter(rows)
    while block := list(itertools.islice(iterator, BLOCK_ROWS)):
        yield block


def _script(kind: str, content: Any) -> str:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True)
    packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
    return f'<script type="application/octet-stream" class="{kind}">{packed}</script>\n'


def _row(row: Row, folder: Path) -> list[Any]:
    url = None if row.audio is None else _relative(row.audio, folder)
    return [list(row.cells), int(row.failed), url, row.offset, row.seconds]


def _words(row: Row) -> list[Any]:
    """Milliseconds and hundredths, differences where they are smaller: half of a page is words."""
    packed: list[Any] = []
    last = 0
    for text, start, end, confidence in row.words:
        begin, stop = round(1000 * start), round(1000 * end)
        share = None if confidence is None else round(100 * confidence)
        packed += [text, begin - last, stop - begin, share]
        last = stop
    return packed


def _relative(audio: str, folder: Path) -> str | None:
    """The address of a file as seen from a folder; None where no relative path leads to it."""
    try:
        path = os.path.relpath(audio, folder)
    except ValueError:  # another drive
        return None
    # The address holds the bytes of the name, whatever they are.
    return quote(os.fsencode(path.replace(os.sep, "/")))


@cache
def _template() -> str:
    """The page without its data."""
    files = resources.files(__package__)
    page, style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            "media-src 'self' file:",
            f"script-src 'sha256-{_digest(script)}'",
            f"style-src 'sha256-{_digest(style)}'",
        )
    )
    return page.replace("{policy}", policy).replace("{style}", style).replace("{script}", script)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
