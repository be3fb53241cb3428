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
        for name in ("loaded", "stored"):
            for field in (f"{name}_bytes", f"{name}_sectors", f"first_{name}"):
                setattr(total, field, getattr(total, field) + getattr(counts, field))

    def text(self) -> str:
        """Launches, instructions of warps, bytes and sectors of global memory of each kernel, as
        Markdown, and below the instructions by opcode. Sectors have 32 bytes; the first touches of
        a launch stand in front, and behind them all that its warps asked for."""
        lines = [
            "| kernel | launches | warp instructions | bytes loaded | bytes stored "
            "| sectors loaded: first, all | sectors stored: first, all |",
            "| --- | --: | --: | --: | --: | --: | --: |",
        ]
        for kernel, counts in self.counts.items():
            lines.append(
                f"| {kernel} | {self.launches[kernel]} | {counts.instructions.total()} "
                f"| {counts.loaded_bytes} | {counts.stored_bytes} "
                f"| {counts.first_loaded}, {counts.loaded_sectors} "
                f"| {counts.first_stored}, {counts.stored_sectors} |"
            )
        total: Counter[str] = Counter()
        for counts in self.counts.values():
            total += counts.instructions
        lines += ["", "| opcode | warp instructions |", "| --- | --: |"]
        lines += [f"| {opcode} | {count} |" for opcode, count in total.most_common()]
        return "\n".join(lines)
