"""A table in Markdown that is printed line by line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Table:
    """Columns of a least width each.

    Args:
        columns: name and width, in characters, of each.
    """

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self.columns = columns

    def head(self) -> str:
        """The first two lines."""
        names = self.line(name for name, _ in self.columns)
        return f"{names}\n{self.line('-' * width for _, width in self.columns)}"

    def line(self, cells: Iterable[str]) -> str:
        """A line; as many cells as columns, else a ValueError."""
        pairs = zip(cells, self.columns, strict=True)
        return f"| {' | '.join(f'{cell:<{width}}' for cell, (_, width) in pairs)} |"
