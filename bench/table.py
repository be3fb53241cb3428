"""A table of text, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header.

    Attributes:
        header: of each column; the first is left-aligned, as are those in `text`.
        rows: as many cells each.
        text: columns of words instead of numbers.
        title: what it is of.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: Sequence[int] = ()
    title: str = ""

    def __str__(self) -> str:
        """As the terminal shows it; the title stands in the corner."""
        head = [self.title or self.header[0], *self.header[1:]]
        lines = [head, *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *others = zip(cells, widths, strict=True)
            aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
            return "  ".join(aligned).rstrip()

        return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, lines[1:])])
