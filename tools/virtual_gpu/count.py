"""What launches did, in a table: one row for each kernel."""

from __future__ import annotations

from collections import Counter

from .executor import Counts
from .record import Launch


class Table:
    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.counts: dict[str, Counts] = {}

    def add(self, launch: Launch, counts: Counts) -> None:
        self.launches[launch.kernel] += 1
        total = self.counts.setdefault(launch.kernel, Counts())
        total.instructions += counts.instructions
        total.loaded_bytes += counts.loaded_bytes
        total.stored_bytes += counts.stored_bytes

    def text(self) -> str:
        """Launches, instructions of warps and bytes of global memory of each kernel, as Markdown,
        and below the instructions by opcode."""
        lines = [
            "| kernel | launches | warp instructions | bytes loaded | bytes stored |",
            "| --- | --: | --: | --: | --: |",
        ]
        for kernel, counts in self.counts.items():
            lines.append(
                f"| {kernel} | {self.launches[kernel]} | {counts.instructions.total()} "
                f"| {counts.loaded_bytes} | {counts.stored_bytes} |"
            )
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total += counts.instructions
        lines += ["", "| opcode | warp instructions |", "| --- | --: |"]
        lines += [f"| {opcode} | {count} |" for opcode, count in total.most_common()]
        return "\n".join(lines)
